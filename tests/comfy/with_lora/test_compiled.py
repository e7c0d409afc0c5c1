"""A LoRA does not get into torch.compile's way."""

import comfy.model_management
import loras
import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_layers_of_a_kind_are_compiled_once_and_whole(layout, load, shapes, config, with_lora):
    file = loras.kohya(shapes) if layout == "kohya" else loras.diffusers(config.unet_config, shapes)
    plain = load()
    transformer = plain.model.diffusion_model
    layers = [block.linear1 for block in transformer.single_blocks]
    input = loras.random("input", 2, 3, layers[0].in_features)
    compiled = torch.compile(lambda layer, input: layer(input), backend="aot_eager", fullgraph=True)
    stance = "default"
    for strength in (0.8, 0.3):
        comfy.model_management.load_models_gpu([with_lora(plain, file, strength)])
        for layer in layers:
            with torch.inference_mode():
                expected = layer(input)
                with torch.compiler.set_stance(stance):
                    torch.testing.assert_close(compiled(layer, input), expected, rtol=1e-5, atol=1e-5)
            stance = "fail_on_recompile"


@pytest.mark.parametrize("part", ["diffusion_model", "diffusion_model.single_blocks.0"])
@pytest.mark.parametrize("is_lora_first", [True, False], ids=["LoRA first", "compiled first"])
def test_a_part_that_a_node_compiles_is_patched(part, is_lora_first, load, shapes, with_lora, sample, copies):
    plain, file = load(), loras.kohya(shapes)
    expected = sample(with_lora(plain, file, 0.8))
    assert not torch.equal(sample(plain), expected)
    patcher = with_lora(plain, file, 0.8) if is_lora_first else plain.clone()
    patcher.add_object_patch(part, torch.compile(patcher.get_model_object(part), backend="eager"))
    patcher = patcher if is_lora_first else with_lora(patcher, file, 0.8)
    for _ in range(2):
        torch.testing.assert_close(sample(patcher), expected, rtol=1e-4, atol=1e-4)
