"""LoRA in bypass, where ComfyUI puts its own forward around a layer's: newer versions do, and other packages."""

import comfy.lora
import comfy.model_management
import comfy.sd
import loras
import torch
from comfy.patcher_extension import PatcherInjection

BOUND = 1e-5
"""Relative; found: below 1e-6."""


def bypass_by_hand(model, clip, file, strength_model, strength_clip):
    """What ``comfy.sd.load_bypass_lora_for_models`` of newer versions does with plain LoRA."""
    loaded = comfy.lora.load_lora(file, comfy.lora.model_lora_keys_unet(model.model, {}))
    originals = {}

    def inject(patcher):
        for key, adapter in loaded.items():
            layer = patcher.model.get_submodule(key.removesuffix(".weight"))
            up, down, alpha, *_ = adapter.weights
            up, down = (factor.to(layer.weight.device, layer.weight.dtype) for factor in (up, down))
            scale = strength_model * alpha / down.shape[0]
            originals[layer] = forward = layer.forward

            def with_branch(input, forward=forward, up=up, down=down, scale=scale):
                return forward(input) + scale * (input @ down.T) @ up.T

            layer.forward = with_branch

    def eject(patcher):
        while originals:
            layer, forward = originals.popitem()
            layer.forward = forward

    patched = model.clone()
    patched.set_injections("bypass_lora", [PatcherInjection(inject=inject, eject=eject)])
    return patched, None


with_bypass = getattr(comfy.sd, "load_bypass_lora_for_models", bypass_by_hand)


def test_bypass_is_as_in_stock_comfyui_and_leaves_nothing_behind(load, twin, sample, with_lora, shapes, copies):
    plain = load(0, 1)
    expected = sample(plain)
    for make in {with_bypass, bypass_by_hand}:
        patched, _ = make(plain, None, loras.kohya(shapes), 0.8, 0)
        reference = sample(with_lora(twin, loras.kohya(shapes), 0.8))
        assert (sample(patched) - reference).norm() < BOUND * reference.norm()
        comfy.model_management.unload_all_models()
        assert torch.equal(sample(plain), expected)


def test_bypass_and_patches_add_up(load, twin, sample, with_lora, shapes, copies):
    first, second = loras.kohya(shapes), loras.kohya(shapes, seed="second")
    patched, _ = with_bypass(with_lora(load(0, 1), first, 0.5), None, second, 0.8, 0)
    reference = sample(with_lora(with_lora(twin, first, 0.5), second, 0.8))
    assert (sample(patched) - reference).norm() < BOUND * reference.norm()


def test_a_streamed_weight_reads_as_where_it_computes(load):
    """There the bypass brings its factors, once."""
    patcher = load()
    layer = patcher.model.diffusion_model.double_blocks[0].img_mlp[0]
    meta = torch.device("meta")
    patcher.model.streaming.patching.apply({}, {}, meta, torch.float32)
    assert layer.weight.device == meta
    assert layer.device.type == "cpu"
    comfy.model_management.load_models_gpu([patcher])
    assert layer.weight.device.type == "cpu"
    assert torch.equal(layer.weight.clone(), layer.dequantise(torch.float32))
