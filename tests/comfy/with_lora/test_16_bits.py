"""Patches on a model that computes in bf16 or fp16, as it does on a GPU."""

import logging

import comfy.lora
import comfy.model_management
import loras
import pytest
import torch
from comfy.model_patcher import LowVramPatch
from torch.nn.functional import linear

LAYER = "diffusion_model.double_blocks.1.img_mlp.0"
SHAPE = (1024, 256)
KEY = f"{LAYER}.weight"
IN_FP32 = ("oft", "oft with a constraint", "boft")


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def dtype(request):
    return request.param


@pytest.fixture
def layer_of(load, with_lora, dtype):
    """A function: the patcher with this LoRA, loaded to compute in ``dtype``, and its layer."""

    def make(file, *, strength=0.8):
        patcher = with_lora(load(), file, strength)
        patcher.model.model_config.set_inference_dtype(dtype, None)
        patcher.model.manual_cast_dtype = dtype
        comfy.model_management.load_models_gpu([patcher])
        return patcher, patcher.model.get_submodule(LAYER)

    return make


@pytest.mark.parametrize("kind", list(loras.adapters(LAYER, SHAPE)))
def test_a_dense_weight_is_patched_as_in_stock_comfyui_to_the_bit(kind, layer_of, dtype, caplog):
    """As where it offloads the layer; OFT and BOFT, which fail there, as where the model fits."""
    caplog.set_level(logging.WARNING)
    patcher, layer = layer_of(loras.adapters(LAYER, SHAPE)[kind])
    input = loras.random("input", 2, 3, SHAPE[1]).to(dtype)
    with torch.inference_mode():
        found = layer(input)
        assert not caplog.messages
        weight = plain = layer.dequantise(dtype)
        if kind in IN_FP32:
            weight = comfy.lora.calculate_weight(patcher.patches[KEY], plain.float(), KEY).to(dtype)
        elif KEY in patcher.patches:
            weight = LowVramPatch(KEY, patcher.patches)(plain.clone())
        bias = layer.bias.to(dtype)
        assert torch.equal(found, linear(input, weight, bias))
        unpatched = linear(input, plain, layer._parameters["bias"].to(dtype))
    assert found.dtype == dtype
    assert (found - unpatched).norm() > 0.005 * unpatched.norm()


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("rank", [8, 128])
def test_a_low_rank_branch_is_as_near_to_exact_as_the_product_without_it(rank, layer_of, dtype):
    file = loras.kohya({LAYER.removeprefix("diffusion_model."): SHAPE}, rank)
    input = loras.random("input", 2, 3, SHAPE[1]).to(dtype)
    errors = []
    for strength in (0.0, 0.8):
        patcher, layer = layer_of(file, strength=strength)
        with torch.inference_mode():
            weight = layer.dequantise(torch.float32)
            if KEY in patcher.patches:
                weight = comfy.lora.calculate_weight(patcher.patches[KEY], weight, KEY)
            exact = linear(input.float(), weight, layer.bias.float())
            factors = [buffer for name, buffer in layer.named_buffers() if name.startswith(("lora_up", "lora_down"))]
            assert all(factor.dtype == dtype for factor in factors), "else each forward would cast them"
            assert factors
            errors.append(((layer(input).float() - exact).norm() / exact.norm()).item())
    plain, patched = errors
    assert patched < 2 * plain


def test_twice_the_bytes_are_taken_for_what_is_patched_in_fp32(layer_of, dtype):
    taken = [
        layer_of(loras.adapters(LAYER, SHAPE)[kind])[0].model.streaming.patching.scratch_bytes
        for kind in ("loha", "oft")
    ]
    assert taken == [2 * 2 * SHAPE[0] * SHAPE[1], 2 * 4 * SHAPE[0] * SHAPE[1]]
