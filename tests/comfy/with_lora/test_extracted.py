"""A LoRA made from a streamed model that has patches: the patched values of stock ComfyUI, or a refusal.

ComfyUI's node *Extract and Save Lora* does it; older ones have patched weights put in place first, newer ones ask for
each.
"""

import comfy.model_patcher
import loras
import pytest
import torch
from comfy_extras.nodes_lora_extract import LORAType, calc_lora_model

from flux_nf4.offload.comfyui.adopt import stream_model
from flux_nf4.offload.plan import Residency

PREFIX = "diffusion_model."
ASKS_FOR_EACH = "return_weight" in comfy.model_patcher.ModelPatcher.patch_weight_to_device.__code__.co_varnames


def extracted(patcher):
    """The dense values that the node makes a LoRA of."""
    found = {}
    calc_lora_model(patcher, 4, PREFIX, PREFIX, found, LORAType.FULL_DIFF, bias_diff=True)
    return found


@pytest.fixture
def patches(shapes):
    """A LoRA, and differences of biases, by ComfyUI's names."""
    biases = {f"{PREFIX}{name}.diff_b": torch.full((rows,), 0.25) for name, (rows, _) in shapes.items()}
    return loras.generic(shapes) | biases


@pytest.fixture
def streamed_twin(copied_twin):
    cpu = torch.device("cpu")
    return stream_model(comfy.model_patcher.ModelPatcher(copied_twin(), cpu, cpu), Residency(), None)


@pytest.fixture(params=["4-bit", "dense"])
def streamed_one(request, load, streamed_twin):
    """Of the same values as ``twin``."""
    return load(1, 1) if request.param == "4-bit" else streamed_twin


def test_a_lora_is_made_of_patched_values_or_refused(streamed_one, twin, patches, with_lora, copies):
    plain, wanted = extracted(twin), extracted(with_lora(twin, patches))
    assert any((wanted[name] - plain[name]).abs().max() > 0.1 for name in wanted)
    ours = with_lora(streamed_one, patches)
    if not ASKS_FOR_EACH:
        with pytest.raises(ValueError, match="a streamed model cannot be saved by this node"):
            extracted(ours)
        return
    found = extracted(ours)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_a_layer_that_comfyui_does_not_cast_reads_as_patched(streamed_twin, copies, monkeypatch):
    ours, key = streamed_twin, f"{PREFIX}img_in.weight"
    layer = ours.model.diffusion_model.img_in
    monkeypatch.setattr(layer, "__class__", torch.nn.Linear)
    ours.add_patches({key: ("diff", (torch.full_like(layer.weight, 0.5),))})
    torch.testing.assert_close(ours.model_state_dict()[key], layer.weight + 0.5)


def test_a_model_without_patches_is_read_as_it_is(streamed_one, twin, copies):
    wanted, found = extracted(twin), extracted(streamed_one)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("name", ["double_blocks.0.img_attn.qkv", "img_in"])
def test_a_packed_weight_reads_as_patched_and_is_merged_as_it_was(name, load, twin, shapes, with_lora, copies):
    """Black Forest Labs' LoRAs widen the second of these."""
    file = loras.black_forest_labs(twin.model) if name == "img_in" else loras.generic(shapes)
    ours, key = with_lora(load(1, 1), file), f"{PREFIX}{name}.weight"
    theirs = with_lora(twin, file)
    theirs.patch_model()
    wanted = theirs.model_state_dict()[key].clone()
    theirs.unpatch_model()
    read = ours.model_state_dict()[key]
    assert read.shape == wanted.shape
    torch.testing.assert_close(read.clone(), wanted)
    assert torch.equal(ours.get_key_patches()[key][0][0].clone(), load(1, 1).model_state_dict()[key].clone())
