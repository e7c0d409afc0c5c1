"""What people combine with Flux, on a streamed model with a LoRA: each as in stock ComfyUI on the dense twin.

Where a thing comes from a package outside ComfyUI, a few lines here patch the model in the way in which that does it.
"""

import types

import comfy.controlnet
import comfy.ldm.flux.controlnet
import comfy.model_detection
import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
import loras
import nodes
import pytest
import torch
from comfy.ldm.flux.layers import timestep_embedding
from comfy_extras import nodes_edit_model, nodes_slg
from make_checkpoint import Recipe, make_checkpoint

from flux_nf4.checkpoints import load_transformer, streamed
from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue
from flux_nf4.offload.plan import Residency

HOST = torch.device("cpu")
RECIPE = Recipe(double_blocks=2, single_blocks=3, hidden=256, unet_only=True, in_channels=384)

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
    """The union kind, which is told what its picture is, by ComfyUI's node."""
    model = comfy.ldm.flux.controlnet.ControlNetFlux(
        num_union_modes=4,
        operations=comfy.ops.disable_weight_init,
        **config.unet_config | {"dtype": torch.float32},
    )
    for name, parameter in model.named_parameters():
        parameter.data = loras.random(name, *parameter.shape, scale=0.05)
    net = comfy.controlnet.ControlNet(model, load_device=torch.device("cpu"), extra_conds=["y", "guidance"])
    net.set_extra_arg("control_type", [2])
    node, picture = nodes.ControlNetApplyAdvanced(), random(1, 64, 64, 3)
    positive, negative = node.apply_controlnet(conditioning(1), conditioning(5), net, picture, 0.8, 0.0, 1.0)
    return unchanged, {"cfg": 2.0, "positive": positive, "negative": negative}


def redux(config, conditioning):
    """A style model adds tokens to the prompt's, by ComfyUI's node."""

    class StyleModel:
        def get_cond(self, seen):
            return seen

    seen = random(1, 20, 4096)
    (positive,) = nodes.StyleModelApply().apply_stylemodel(conditioning(1), StyleModel(), seen, 1.0, "multiply")
    assert positive[0][0].shape[1] == 28
    return unchanged, {"positive": positive}


def kontext(config, conditioning):
    latent = {"samples": random(1, 16, 8, 6)}
    result = nodes_edit_model.ReferenceLatent.execute(conditioning(1), latent)
    return unchanged, {"positive": getattr(result, "result", result)[0]}


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


def own_forward(config, conditioning):
    """As PuLID: its own function in place of the model's, which adds to the picture after blocks."""

    def forward(self, img, img_ids, txt, txt_ids, timesteps, y, guidance, *_, **__):
        img, txt = self.img_in(img), self.txt_in(txt)
        vec = self.time_in(timestep_embedding(timesteps, 256)) + self.guidance_in(timestep_embedding(guidance, 256))
        vec, pe = vec + self.vector_in(y), self.pe_embedder(torch.cat([txt_ids, img_ids], dim=1))
        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, vec=vec, pe=pe)
            img = img + 0.1 * img.tanh()
        count, img = txt.shape[1], torch.cat([txt, img], dim=1)
        for block in self.single_blocks:
            img = block(img, vec=vec, pe=pe)
        return self.final_layer(img[:, count:], vec)

    def apply(patcher):
        patched = patcher.clone()
        bound = types.MethodType(forward, patched.model.diffusion_model)
        patched.add_object_patch("diffusion_model.forward_orig", bound)
        return patched

    return apply, {}


def own_loop(config, conditioning):
    """As WaveSpeed, which puts other lists of blocks in place for a forward: in another order, one twice."""

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
        own_forward,
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


def test_fill_is_as_in_stock_comfyui(
    flux_config, conditioning, sample, with_lora, shapes, stock_model, copies, tmp_path, monkeypatch
):
    """The model that paints a mask in takes a picture and the mask beside the latent."""

    def config(*_):
        made = flux_config(RECIPE.double_blocks, RECIPE.single_blocks)
        made.unet_config["in_channels"] = RECIPE.in_channels // 4
        return made

    monkeypatch.setattr(comfy.model_detection, "model_config_from_unet", config)
    make_checkpoint(tmp_path / "fill.safetensors", RECIPE)
    model = load_transformer(read_catalogue(tmp_path / "fill.safetensors"))
    ours = streamed(model, Residency((("double", 0), ("single", 1))), node_id=None)
    dense = stock_model(config(), tmp_path / "twin.safetensors", RECIPE)
    stock = comfy.model_patcher.ModelPatcher(dense, load_device=HOST, offload_device=HOST)

    class Vae:
        def encode(self, pixels):
            return pixels.mean() + random(1, 16, 8, 8)

    mask, latents = torch.zeros(1, 64, 64), []
    mask[..., :32] = 1
    for patcher, seen in ((stock, mask), (ours, mask), (ours, 1 - mask)):
        positive, negative, latent = nodes.InpaintModelConditioning().encode(
            conditioning(1), conditioning(2), random(1, 64, 64, 3), Vae(), seen
        )
        given = {"latent": latent["samples"], "noise_mask": latent["noise_mask"], "positive": positive}
        latents.append(sample(with_lora(patcher, loras.kohya(shapes), 0.8), negative=negative, **given))
    expected, found, with_other_mask = latents
    assert (found - expected).norm() < BOUND * expected.norm()
    assert (with_other_mask - expected).norm() > 0.01 * expected.norm()


def test_previews_are_those_of_stock_comfyui_and_change_nothing(load, twin, sample, with_lora, shapes, copies):
    file, previews = loras.kohya(shapes), []
    for patcher in (twin, load(0, 1)):
        patched, shown = with_lora(patcher, file, 0.8), []

        def show(step, picture, noisy, total, shown=shown):
            shown.append((step, total, picture.clone()))

        latent = sample(patched, steps=3, callback=show)
        assert torch.equal(latent, sample(patched, steps=3))
        previews.append(shown)
    for (step, total, expected), (*place, found) in zip(*previews, strict=True):
        assert place == [step, total]
        assert (found - expected).norm() < BOUND * expected.norm()
    assert len(previews[0]) == 3
