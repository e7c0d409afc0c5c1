"""LoRAs of Flux whose key layout ComfyUI does not read: the log says so, and not that they are for another model."""

import comfy.hooks
import comfy.lora
import loras
import pytest
import torch


def layouts(model):
    shapes = loras.linear_shapes(model, "blocks")
    diffusers, generic = loras.diffusers(model.model_config.unet_config, shapes), loras.generic(shapes)
    return {
        "PEFT": {name.replace("transformer.", "base_model.model."): t for name, t in diffusers.items()},
        "PEFT in diffusers": {
            name.replace("transformer.", "transformer.base_model."): t for name, t in diffusers.items()
        },
        "diffusers, bare": {name.replace("transformer.", ""): t for name, t in diffusers.items()},
        "Flux, bare": {name.replace("diffusion_model.", ""): t for name, t in generic.items()},
        "a checkpoint's prefix": {f"model.{name}": t for name, t in generic.items()},
    }


@pytest.mark.parametrize(
    "layout", ["PEFT", "PEFT in diffusers", "diffusers, bare", "Flux, bare", "a checkpoint's prefix"]
)
def test_a_flux_lora_in_a_layout_that_is_not_read_is_called_that(layout, load, twin_model, with_lora, caplog):
    lora = layouts(twin_model)[layout]
    read = comfy.lora.model_lora_keys_unet(twin_model, {})
    if any(name.removesuffix(".lora_A.weight") in read for name in lora):
        pytest.skip("this ComfyUI reads it")
    patched = with_lora(load(), lora)
    (message,) = [line for line in caplog.messages if line.startswith("LoRA:")]
    assert "in a layout that ComfyUI does not read" in message
    assert any(f"('{name}')" in message for name in lora)
    assert "another family" not in message
    assert not patched.patches


def test_a_canny_lora_in_a_hook_is_sent_to_the_node_that_reads_it(load, twin_model, sample, conditioning, caplog):
    lora = loras.black_forest_labs(twin_model)
    positive = conditioning()
    positive[0][1]["hooks"] = comfy.hooks.create_hook_lora(lora=lora, strength_model=1.0, strength_clip=0.0)
    model = load()
    assert torch.equal(sample(model, positive=positive), sample(model))
    assert any("which only the node Load LoRA reads" in line for line in caplog.messages)


def test_blocks_inside_of_blocks_are_of_another_model(load, with_lora, caplog):
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    with_lora(load(), {f"{name}.lora_up.weight": torch.ones(64, 4), f"{name}.lora_down.weight": torch.ones(4, 64)})
    assert any("Is the LoRA for a model of another family" in line for line in caplog.messages)


@pytest.mark.parametrize("hidden", ["\x1b[2J\x1b[31m", "a\nERROR ", "\u202e", "x" * 10_000])
def test_a_name_that_a_terminal_would_obey_or_that_fills_it_is_not_shown(hidden, load, with_lora, caplog):
    name = f"{hidden}.double_blocks.0.img_mod.lin"
    lora = {f"{name}.lora_up.weight": torch.ones(64, 4), f"{name}.lora_down.weight": torch.ones(4, 64)}
    with_lora(load(), lora)
    lines = [line for line in caplog.messages if line.startswith("LoRA:")]
    assert lines
    assert not any(hidden in line for line in lines)
