"""The same patches give what stock ComfyUI gives on the dense twin, in fp32 on the CPU."""

import comfy.weight_adapter
import loras
import pytest

LOW_RANK = 1e-5
"""Relative bound of the low-rank branch, which adds in another order than stock ComfyUI; found: 3e-7 to 8e-7."""

LAYER = "diffusion_model.double_blocks.1.img_mlp.0"
SHAPE = (1024, 256)
KINDS = list(loras.adapters(LAYER, SHAPE))


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("layout", ["kohya", "generic", "diffusers", "onetrainer", "simpletuner", "xlabs"])
def test_every_key_layout_is_as_in_stock_comfyui(layout, compare, with_lora, shapes, config):
    make = getattr(loras, layout)
    file = make(config.unet_config, shapes) if layout in ("diffusers", "onetrainer", "simpletuner") else make(shapes)
    assert compare(lambda patcher: with_lora(patcher, file, 0.7)) < LOW_RANK


def test_a_lora_of_the_layers_outside_the_blocks_is_as_in_stock_comfyui(compare, with_lora, twin_model, config):
    outside = loras.linear_shapes(twin_model, "")
    outside = {name: shape for name, shape in outside.items() if "blocks" not in name}
    file = loras.diffusers(config.unet_config, outside) | loras.generic(outside)
    assert compare(lambda patcher: with_lora(patcher, file)) < LOW_RANK


def test_a_lora_that_widens_img_in_is_as_in_stock_comfyui(compare, with_lora, twin_model):
    """Black Forest Labs' Canny and Depth: it also sets norms and changes biases."""
    file = loras.black_forest_labs(twin_model)
    widths = []

    def apply(patcher):
        patched = with_lora(patcher, file)
        model = patched.model.diffusion_model
        model.final_layer.register_forward_pre_hook(lambda *_: widths.append(model.img_in.weight.shape[1]))
        return patched

    assert compare(apply) < LOW_RANK
    assert widths == [128, 128], "ComfyUI reads there that the model takes a control picture"


@pytest.fixture
def difference(load, twin, layer_output):
    """A function: the relative difference of one layer's output to stock ComfyUI's, after checking for an effect."""

    def difference(apply, layer=LAYER):
        plain, expected = layer_output(twin, layer), layer_output(apply(twin), layer)
        assert (expected - plain).norm() > 0.005 * plain.norm(), "the patch changes too little to prove anything"
        found = layer_output(apply(load()), layer)
        return ((found - expected).norm() / expected.norm()).item()

    return difference


@pytest.mark.parametrize("kind", KINDS)
def test_every_other_kind_of_patch_is_that_of_stock_comfyui_to_the_bit(kind, difference, with_lora):
    file = loras.adapters(LAYER, SHAPE)[kind]
    assert difference(lambda patcher: with_lora(patcher, file, 0.8)) == 0


def test_every_adapter_class_of_comfyui_is_among_them(with_lora, load):
    found = {"lora"}
    for file in loras.adapters(LAYER, SHAPE).values():
        patches = with_lora(load(), file).patches
        found |= {getattr(patch[1], "name", None) for of_key in patches.values() for patch in of_key}
    assert found >= {adapter.name for adapter in comfy.weight_adapter.adapters}


@pytest.mark.parametrize("kind", ["loha", "dora", "difference"])
def test_a_patch_of_some_rows_is_that_of_stock_comfyui_to_the_bit(kind, difference, with_lora):
    """As diffusers splits q, k and v."""
    file = loras.adapters("transformer.single_transformer_blocks.2.attn.to_k", (256, 256))[kind]
    assert difference(lambda patcher: with_lora(patcher, file), "diffusion_model.single_blocks.2.linear1") == 0


def test_a_function_on_the_rows_is_that_of_stock_comfyui_to_the_bit(difference, with_lora):
    """diffusers has the halves of the last modulation the other way round."""
    up, down = loras.low_rank("norm_out", (512, 256))
    key = "transformer.norm_out.linear"
    file = {f"{key}.lora_B.weight": up, f"{key}.lora_A.weight": down}
    layer = "diffusion_model.final_layer.adaLN_modulation.1"
    assert difference(lambda patcher: with_lora(patcher, file), layer) == 0


@pytest.mark.parametrize("strengths", [(0.5, 0.9), (0.0, 1.1)])
def test_strength_of_the_model_is_that_of_stock_comfyui_to_the_bit(strengths, difference):
    """As merge nodes scale the weights."""
    patches = {f"{LAYER}.weight": ("diff", (loras.random("merge", *SHAPE, scale=0.05),))}

    def apply(patcher):
        patched = patcher.clone()
        patched.add_patches(patches, *strengths)
        return patched

    assert difference(apply) == 0


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("rank", [1, 16, 128])
@pytest.mark.parametrize("count", [1, 4, 16])
def test_any_number_of_loras_of_any_rank_is_as_in_stock_comfyui(count, rank, difference, with_lora):
    name = LAYER.removeprefix("diffusion_model.")
    files = [loras.kohya({name: SHAPE}, rank, alpha=float(rank), seed=str(index)) for index in range(count)]

    def apply(patcher):
        for index, file in enumerate(files):
            patcher = with_lora(patcher, file, 0.3 + 0.1 * index)
        return patcher

    assert difference(apply) < LOW_RANK


@pytest.mark.parametrize("later", [kind for kind in KINDS if kind.startswith(("lokr", "dora", "oft", "set"))])
def test_a_lora_before_and_after_another_kind_of_patch_keeps_its_place(later, difference, with_lora):
    lora = loras.kohya({LAYER.removeprefix("diffusion_model."): SHAPE})
    other = loras.adapters(LAYER, SHAPE)[later]
    assert difference(lambda patcher: with_lora(with_lora(with_lora(patcher, lora), other, 0.9), lora, -0.4)) == 0


def test_a_wrapped_weight_is_that_of_stock_comfyui_to_the_bit(difference, with_lora):
    """As ComfyUI's training node wraps weights: after all patches."""
    lora = loras.kohya({LAYER.removeprefix("diffusion_model."): SHAPE})

    def apply(patcher):
        patched = with_lora(patcher, lora)
        patched.add_weight_wrapper(f"{LAYER}.weight", lambda weight: weight.clamp(-0.02, 0.02))
        patched.add_weight_wrapper(f"{LAYER}.bias", lambda bias: bias + 1)
        return patched

    assert difference(apply) == 0
