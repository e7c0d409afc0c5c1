"""Which models leave the device without copies, and unpinned."""

import comfy.model_patcher
import pytest
import torch

from flux_nf4.offload.comfyui.encoders import leave_unpinned, leave_without_copies

CPU, META = torch.device("cpu"), torch.device("meta")


class OfAnother(comfy.model_patcher.ModelPatcher):
    """Of another package, or ComfyUI's for dynamic VRAM."""


def visiting(kind=comfy.model_patcher.ModelPatcher, load_device=META, offload_device=CPU):
    patcher = kind(torch.nn.Linear(2, 2), load_device, offload_device)
    leave_without_copies(patcher)
    leave_unpinned(patcher)
    return patcher


def is_pinned(patcher, monkeypatch):
    """Whether ComfyUI would pin a weight of ``patcher``, if it pins at all."""
    asked = []
    monkeypatch.setattr(comfy.model_management, "pin_memory", asked.append, raising=False)
    getattr(patcher, "pin_weight_to_device", asked.append)("weight")
    return bool(asked)


def test_a_stock_patcher_and_its_clones_pin_nothing(monkeypatch):
    patcher = visiting()
    assert type(patcher.model) is not torch.nn.Linear
    assert not is_pinned(patcher, monkeypatch)
    assert not is_pinned(patcher.clone(), monkeypatch)


def test_one_of_another_class_stays_as_it_is(monkeypatch):
    patcher = visiting(OfAnother)
    assert type(patcher) is OfAnother
    assert type(patcher.model) is torch.nn.Linear
    assert is_pinned(patcher, monkeypatch)


@pytest.mark.parametrize("devices", [{"offload_device": META}, {"load_device": torch.device("mps")}], ids=str)
def test_what_does_not_return_or_has_the_hosts_memory_keeps_no_copy(devices):
    assert type(visiting(**devices).model) is torch.nn.Linear
