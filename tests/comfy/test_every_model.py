"""Every family of models that ComfyUI has, made small: streamed, it computes what it computes in stock ComfyUI."""

import re

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import environment
import model_case
import model_families
import pytest
import torch
from model_families import CASES

from flux_nf4.offload.comfyui import block_lists
from flux_nf4.offload.comfyui.adopt import stream_model
from flux_nf4.offload.comfyui.patcher import StreamedModelPatcher
from flux_nf4.offload.plan import Residency

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if model_case.is_there(case)])
def test_streamed_is_as_in_stock_comfyui(name, copies, monkeypatch):
    """None of its blocks resident, and half of them."""
    # Some small models have parts of full size.
    monkeypatch.setattr(block_lists, "_LEAST_PART", 0.01)
    monkeypatch.setattr(StreamedModelPatcher, "staging_bytes", 1)
    case = CASES[name]
    model = model_case.make_model(case)
    expected = model_case.forward(model, case)
    assert expected.isfinite().all()
    assert expected.std() > 0
    patcher = comfy.model_patcher.ModelPatcher(model, CPU, CPU)
    every = [size.kind for size in stream_model(patcher, Residency(), None).model.streaming.streamer.sizes()]
    for share in (0, 0.5):
        counts = {kind: int(every.count(kind) * share) for kind in every}
        streamed = stream_model(patcher, Residency(tuple(counts.items())), None)
        comfy.model_management.load_models_gpu([streamed])
        copies.nbytes = 0
        assert torch.equal(model_case.forward(streamed.model, case), expected)
        assert copies.nbytes > 0
        assert len(streamed.model.streaming.streamer.plan.resident) == sum(counts.values())


def test_no_class_of_comfyui_is_forgotten():
    """A new one needs a case, or a reason why it has none."""
    tried = {name for case in CASES.values() for name in (case.supported, *case.stands_for)}
    every = {supported.__name__ for supported in comfy.supported_models.models}
    assert every - tried - model_families.UNTRIED.keys() == set()
    assert not tried & model_families.UNTRIED.keys()


@pytest.mark.parametrize("text", ["README.md", "README.zh.md"])
def test_the_readme_names_the_families_that_are_tried_and_no_other(text):
    listed = (environment.ROOT / text).read_text("utf-8").split("<!-- families -->")[1].split("<!-- /families -->")[0]
    families = re.split(r",\s+", listed.strip())
    assert families == sorted(families, key=str.lower)
    of = {name: [family for family in families if re.match(rf"{re.escape(family)}\b", name)] for name in CASES}
    assert [name for name, found in of.items() if not found] == []
    assert {max(found, key=len) for found in of.values()} == set(families)
