"""The benchmark of FLUX.2: its files are what diffusers' own model of that size has, and a dry run measures them."""

import json

import checkpoint_layout as layout
import comfy.supported_models
import diffusers
import pytest
import torch
from cases import Case
from flux2 import SETTINGS, SIZES, TINY, run, table


@pytest.mark.parametrize("name", SIZES)
def test_the_tensors_are_those_of_diffusers_model(name):
    size = SIZES[name]
    with torch.device("meta"):
        model = diffusers.Flux2Transformer2DModel(
            num_layers=size.doubles,
            num_single_layers=size.singles,
            num_attention_heads=size.hidden // 128,
            joint_attention_dim=size.text,
            guidance_embeds=size.guidance,
        )
    assert layout.flux2_of_diffusers(*size) == {key: tuple(value.shape) for key, value in model.state_dict().items()}


@pytest.mark.skipif(not hasattr(comfy.supported_models, "Flux2"), reason="this ComfyUI does not know FLUX.2")
def test_a_tiny_one_is_made_and_measured(tmp_path, monkeypatch):
    flux2 = comfy.supported_models.Flux2
    monkeypatch.setattr(flux2, "unet_extra_config", {**flux2.unet_extra_config, "num_heads": TINY.hidden // 128})
    with torch.inference_mode():
        results = run(tmp_path, tmp_path, {"tiny": TINY}, Case("", 64, text_tokens=8), repeats=1)
    assert json.loads((tmp_path / "flux2.json").read_text()) == results
    assert [row["setting"] for row in results["models"]["tiny"]] == list(SETTINGS)
    assert all(row["ms"] > 0 for row in results["models"]["tiny"])
    assert len(table(results).splitlines()) == 2 + len(SETTINGS)
