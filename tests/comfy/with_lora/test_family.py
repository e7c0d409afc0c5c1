"""What people combine with Flux, on a streamed model with a LoRA: each as in stock ComfyUI on the dense twin.

Where a thing comes from a package outside ComfyUI, a few lines here patch the model in the way in which that does it.
"""

import comfy.controlnet
import comfy.ldm.flux.controlnet
import comfy.ops
import comfy.patcher_extension
import loras
import pytest
import torch
from comfy_extras import nodes_slg

BOUND = 1e-5
"""Relative; found: 2e-7 to 2e-6."""


def random(*size, scale=1.0):
    return loras.random(str(size), *size, scale=scale)


def unchanged(patcher):
    return patcher


def with_entry(conditioning, **entries):
    return [[tensor, options | entries] for tensor, options in conditioning]


# What a scenario is: a function that patches, and what to sample with.


def control_net(config, conditioning):
    """The union kind, which is told what its picture is."""
    model = comfy.ldm.flux.controlnet.ControlNetFlux(
        num_union_modes=4,
        operations=comfy.ops.disable_weight_init,
        **config.unet_config | {"dtype": torch.float32},
    )
    for name, parameter in model.named_parameters():
        parameter.data = loras.random(name, *parameter.shape, scale=0.05)
    net = comfy.controlnet.ControlNet(model, load_device=torch.device("cpu"), extra_conds=["y", "guidance"])
    net.set_extra_arg("control_type", [2])
    net.set_cond_hint(random(1, 3, 64, 64), 0.8, (0.0, 1.0))
    return unchanged, {"positive": with_entry(conditioning(1), control=net, control_apply_to_uncond=False)}


def redux(config, conditioning):
    """A style model adds tokens to the prompt's."""
    ((tokens, options),) = conditioning(1)
    return unchanged, {"positive": [[torch.cat([tokens, random(1, 20, 4096)], dim=1), options]]}


def kontext(config, conditioning):
    return unchanged, {"positive": with_entry(conditioning(1), reference_latents=[random(1, 16, 8, 6)])}


def regional(config, conditioning):
    left = with_entry(conditioning(1), area=(8, 4, 0, 0), strength=1.0)
    mask = torch.zeros(1, 8, 8)
    mask[..., 4:] = 1
    return unchanged, {"positive": left + with_entry(conditioning(2), mask=mask, mask_strength=0.7)}


def batch(config, conditioning):
    return unchanged, {"latent": torch.zeros(3, 16, 8, 8)}


def negative_prompt(config, conditioning):
    return unchanged, {"cfg": 3.5, "negative": conditioning(5)}


def negative_prompt_of_another_length(config, conditioning):
    """ComfyUI cannot run these two in one forward."""
    ((tokens, options),) = conditioning(5)
    return unchanged, {"cfg": 3.5, "negative": [[tokens[:, :5], options]]}


def image_to_image(config, conditioning):
    return unchanged, {"latent": random(1, 16, 8, 8), "denoise": 0.6, "steps": 3}


def inpaint(config, conditioning):
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    return unchanged, {"latent": random(1, 16, 8, 8), "noise_mask": mask}


def of_sampler(name):
    def make(config, conditioning):
        return unchanged, {"sampler": name, "steps": 3}

    return make


def skip_layer_guidance(config, conditioning):
    def apply(patcher):
        result = nodes_slg.SkipLayerGuidanceDiT.execute(patcher, 3.0, 0.0, 1.0, "1", "0, 2", 0.3)
        return getattr(result, "result", result)[0]

    return apply, {"cfg": 3.5, "negative": conditioning(5)}


def attention_patch(config, conditioning):
    """As IP adapters for Flux: something is added after a block."""

    def apply(patcher):
        def after(arguments, extra):
            out = extra["original_block"](arguments)
            return {**out, "img": out["img"] + 0.1 * arguments["img"].tanh()}

        patched = patcher.clone()
        patched.set_model_patch_replace(after, "dit", "double_block", 0)
        patched.set_model_patch_replace(after, "dit", "single_block", 1)
        return patched

    return apply, {}


def block_cache(config, conditioning):
    """As TeaCache and WaveSpeed: a block is not called, and its last difference stands for it."""

    def apply(patcher):
        patched, memory = patcher.clone(), {}

        def cached(name):
            def run(arguments, extra):
                steps = memory[name, "steps"] = memory.get((name, "steps"), 0) + 1
                if steps % 2 == 0:
                    return {**arguments, "img": arguments["img"] + memory[name]}
                before = arguments["img"].clone()
                out = extra["original_block"](arguments)
                memory[name] = out["img"] - before
                return out

            return run

        for index in range(3):
            patched.set_model_patch_replace(cached(index), "dit", "single_block", index)
        return patched

    return apply, {"steps": 4}


def own_loop(config, conditioning):
    """As PuLID and others that put their own function in place of the model's: blocks in another order, one twice."""

    def apply(patcher):
        def wrapper(executor, *args, **kwargs):
            blocks = patcher.model.diffusion_model.single_blocks
            order = torch.nn.ModuleList([blocks[0], blocks[2], blocks[2], blocks[1]])
            patcher.model.diffusion_model.single_blocks = order
            try:
                return executor(*args, **kwargs)
            finally:
                patcher.model.diffusion_model.single_blocks = blocks

        patched = patcher.clone()
        patched.add_wrapper(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, wrapper)
        return patched

    return apply, {}


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        control_net,
        redux,
        kontext,
        regional,
        batch,
        negative_prompt,
        negative_prompt_of_another_length,
        image_to_image,
        inpaint,
        skip_layer_guidance,
        attention_patch,
        block_cache,
        own_loop,
    )
} | {name: of_sampler(name) for name in ("heun", "dpm_2", "dpmpp_2m_sde")}


@pytest.mark.parametrize("name", SCENARIOS)
def test_it_is_as_in_stock_comfyui(name, config, conditioning, load, twin, sample, with_lora, shapes, copies):
    apply, options = SCENARIOS[name](config, conditioning)
    file = loras.kohya(shapes)
    options = {"positive": conditioning(1)} | options
    expected = sample(apply(with_lora(twin, file, 0.8)), **options)
    found = sample(apply(with_lora(load(0, 1), file, 0.8)), **options)
    assert (found - expected).norm() < BOUND * expected.norm()
    plain = sample(with_lora(twin, file, 0.8), positive=conditioning(1))
    assert plain.shape != expected.shape or not torch.equal(plain, expected), "it must have an effect"
