"""Every Flux.1 variant becomes the model that ComfyUI's own detection makes of its logical shapes.

The files are sparse: a header in the real layout and the quant states, over a body of holes.
"""

import logging

import checkpoint_layout as layout
import comfy.lora
import comfy.ops
import pytest
import torch
from bitsandbytes import functional as bnb
from make_checkpoint import Recipe, make_checkpoint, quantised
from packed_tensors import packed_tensors
from sparse_file import write_sparse
from tiny_blocks import DOUBLES, SINGLES

from flux_nf4.nf4_loader.checkpoint.catalogue import Weight4bit, read_catalogue
from flux_nf4.nf4_loader.checkpoint.errors import CheckpointError
from flux_nf4.nf4_loader.checkpoint.quant_state import QuantState
from flux_nf4.nf4_loader.linear.linear4bit import Linear4bit
from flux_nf4.nf4_loader.models.fill import fill
from flux_nf4.nf4_loader.models.transformers import build_transformer, load_clip_and_vae, materialise

PREFIX = "model.diffusion_model."

DEV = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "hidden_size": 3072,
    "num_heads": 24,
    "mlp_ratio": 4.0,
    "context_in_dim": 4096,
    "vec_in_dim": 768,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
    "depth": 1,
    "depth_single_blocks": 1,
}
LINEARS_PER_DOUBLE, LINEARS_PER_SINGLE = 10, 3


def is_weight(name, shape):
    return name.endswith(".weight") and len(shape) == 2


def in_blocks(name):
    return name.startswith(("double_blocks.", "single_blocks."))


def dev(double=1, single=1, **options):
    return layout.flux(double, single, **({"guidance": True} | options))


@pytest.fixture
def catalogue_of(tmp_path):
    """A function: the catalogue of a file with ``shapes``, of which those that ``packed`` takes are in 4 bits."""

    def make(shapes, *, packed=lambda _: True, quant_type="nf4", blocksize=64, prefix=PREFIX, more=()):
        tensors = {}
        for name, shape in shapes.items():
            if is_weight(name, shape) and packed(name):
                tensors |= packed_tensors(prefix + name, shape, quant_type, blocksize)
            else:
                tensors[prefix + name] = ("BF16", shape, None)
        path = tmp_path / "flux.safetensors"
        write_sparse(path, tensors | dict(more))
        return read_catalogue(path)

    return make


def check(model, shapes, packed=lambda _: True, **changed):
    """``model`` has DEV's configuration but for ``changed``, and exactly the layers of ``shapes``, all on meta."""
    assert {key: model.model_config.unet_config[key] for key in DEV} == DEV | changed
    transformer = model.diffusion_model
    layers = {name: module for name, module in transformer.named_modules() if hasattr(module, "weight")}
    linears = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if is_weight(name, shape)}
    for name, shape in linears.items():
        assert isinstance(layers[name], Linear4bit) == packed(f"{name}.weight")
        assert tuple(layers[name].weight.shape) == shape
        assert (layers[name].bias is not None) == (f"{name}.bias" in shapes)
    assert {name for name, layer in layers.items() if isinstance(layer, torch.nn.Linear)} == set(linears)
    assert all(tensor.is_meta for tensor in (*transformer.parameters(), *transformer.buffers()))


@pytest.mark.parametrize(
    ("kind", "options", "changed"),
    [
        ("Flux", {}, {}),  # dev, Kontext and Krea
        ("FluxSchnell", {"guidance": False}, {"guidance_embed": False}),
        ("FluxInpaint", {"in_channels": 384}, {"in_channels": 96}),  # Fill
        ("Flux", {"in_channels": 128}, {"in_channels": 32}),  # Canny and Depth
    ],
    ids=["dev", "schnell", "fill", "canny_depth"],
)
def test_a_variant_gets_the_model_that_comfyui_has_for_it(kind, options, changed, catalogue_of):
    shapes = dev(**options)
    model = build_transformer(catalogue_of(shapes))
    assert type(model).__name__ == "Flux"
    assert type(model.model_config).__name__ == kind
    check(model, shapes, **changed)


@pytest.mark.parametrize(("in_channels", "added"), [(64, None), (128, 16), (384, 80)])
def test_the_picture_or_mask_that_a_variant_takes_is_added_to_the_latent(in_channels, added, catalogue_of):
    model = build_transformer(catalogue_of(dev(in_channels=in_channels)))
    assert tuple(model.diffusion_model.img_in.weight.shape) == (3072, in_channels)
    condition = model.concat_cond(noise=torch.zeros(1, 16, 8, 8), device="cpu")
    assert added == (None if condition is None else condition.shape[1])


@pytest.mark.parametrize(("double", "single"), [(19, 38), (8, 38), (3, 2)])
def test_the_depth_is_that_of_the_file(double, single, catalogue_of):
    shapes = dev(double, single)
    model = build_transformer(catalogue_of(shapes))
    check(model, shapes, depth=double, depth_single_blocks=single)
    packed = [module for module in model.diffusion_model.modules() if isinstance(module, Linear4bit)]
    in_the_rest = 2 + 3 * 2 + 2
    assert len(packed) == in_the_rest + LINEARS_PER_DOUBLE * double + LINEARS_PER_SINGLE * single


@pytest.mark.parametrize("prefix", [PREFIX, ""])
@pytest.mark.parametrize("norm", [".scale", ".weight"])
@pytest.mark.parametrize("biases", [True, False])
def test_every_way_of_naming_gives_the_same_model(prefix, norm, biases, catalogue_of):
    shapes = {name.replace("_norm.scale", f"_norm{norm}"): shape for name, shape in dev().items()}
    shapes = {name: shape for name, shape in shapes.items() if biases or not name.endswith(".bias")}
    check(build_transformer(catalogue_of(shapes, prefix=prefix)), shapes)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 4096])
def test_the_layers_know_how_they_are_packed(quant_type, blocksize, catalogue_of):
    shapes = dev()
    model = build_transformer(catalogue_of(shapes, quant_type=quant_type, blocksize=blocksize))
    check(model, shapes)
    linear = model.diffusion_model.double_blocks[0].img_attn.qkv
    assert linear.parts == (QuantState(quant_type, blocksize, (9216, 3072)),)
    assert tuple(linear.packed_0.shape) == (9216 * 3072 // 2,)
    assert tuple(linear.absmax_0.shape) == (9216 * 3072 // blocksize,)


@pytest.mark.parametrize(
    "packed",
    [
        in_blocks,
        lambda name: name != "single_blocks.0.linear2.weight",
        lambda name: name not in ("img_in.weight", "txt_in.weight"),
        lambda name: name == "double_blocks.0.img_mlp.0.weight",
    ],
    ids=["only the blocks", "all but one layer", "all but the inputs", "one layer"],
)
def test_what_is_dense_in_the_file_stays_a_layer_of_comfyui(packed, catalogue_of):
    shapes = dev()
    model = build_transformer(catalogue_of(shapes, packed=packed))
    check(model, shapes, packed)
    for module in model.diffusion_model.modules():
        if isinstance(module, torch.nn.Linear):
            assert isinstance(module, (Linear4bit, comfy.ops.manual_cast.Linear))


@pytest.mark.parametrize("packed", [lambda _: True, lambda _: False], ids=["packed", "dense"])
@pytest.mark.parametrize(
    "layer",
    ["double_blocks.0.txt_attn.qkv", "single_blocks.0.linear2", "final_layer.linear", "time_in.out_layer"],
)
def test_a_missing_layer_is_named(layer, packed, catalogue_of):
    shapes = {name: shape for name, shape in dev().items() if not name.startswith(f"{layer}.")}
    catalogue = catalogue_of(shapes, packed=lambda name: packed(name) or name == "img_in.weight")
    with pytest.raises(CheckpointError, match=rf"flux\.safetensors: .* missing \(1\): {layer}\.weight\. "):
        build_transformer(catalogue)


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("double_blocks.0.img_mlp.0.weight", (3072, 12288), (12288, 3072)),
        ("single_blocks.0.modulation.lin.weight", (3072, 3072), (9216, 3072)),
        ("single_blocks.0.linear1.bias", (3072,), (21504,)),
        ("double_blocks.0.txt_attn.norm.query_norm.scale", (64,), (128,)),
    ],
)
@pytest.mark.parametrize("packed", [lambda _: True, lambda name: name == "img_in.weight"], ids=["packed", "dense"])
def test_a_layer_of_another_shape_is_named_with_both_shapes(name, shape, wanted, packed, catalogue_of):
    catalogue = catalogue_of(dev() | {name: shape}, packed=packed)
    with pytest.raises(CheckpointError) as raised:
        build_transformer(catalogue)
    message = str(raised.value)
    assert message.startswith(f"flux.safetensors: {name}: ")
    assert str(shape) in message
    assert f"this model needs {wanted}" in message


def test_another_model_with_flux_names_is_refused(catalogue_of):
    """Chroma Radiance has Chroma's blocks, and makes pixels of them."""
    shapes = dev() | {"distilled_guidance_layer.norms.0.scale": (5120,), "nerf_blocks.0.norm.scale": (64,)}
    shapes |= {"img_in_patch.weight": (3072, 3, 16, 16)}  # where newer versions read the size of its patches
    with pytest.raises(CheckpointError, match=r"ComfyUI sees 'chroma_radiance' in it\. This node loads only"):
        build_transformer(catalogue_of(shapes))


def test_tensors_that_the_model_has_not_are_logged_and_left_out(catalogue_of, caplog):
    used_bytes = catalogue_of(dev()).transformer_bytes
    catalogue = catalogue_of(dev() | layout.linear("adapter", 8, 64))
    with caplog.at_level(logging.WARNING):
        model = build_transformer(catalogue)
    assert "2 tensors not used: adapter.bias, adapter.weight" in caplog.text
    materialise(model.diffusion_model)
    read = []
    fill(model, catalogue, read.append)
    assert sum(read) == used_bytes


def test_nested_absmax_stays_so_and_is_expanded_as_bitsandbytes_does(tiny_config, tmp_path):
    recipe = Recipe(nested=True, hidden=256, double_blocks=DOUBLES, single_blocks=SINGLES, unet_only=True)
    make_checkpoint(tmp_path / "v1.safetensors", recipe)
    catalogue = read_catalogue(tmp_path / "v1.safetensors")
    model = build_transformer(catalogue)
    materialise(model.diffusion_model)
    read = []
    fill(model, catalogue, read.append)
    assert sum(read) == catalogue.transformer_bytes
    linears = {n: m for n, m in model.diffusion_model.named_modules() if isinstance(m, Linear4bit)}
    memory = sum(buffer.nbytes for linear in linears.values() for buffer in linear.buffers())
    assert memory == sum(catalogue.transformer[f"{name}.weight"].ram_bytes for name in linears)
    assert len(linears) == sum(isinstance(part, Weight4bit) for part in catalogue.parts)
    for name, linear in linears.items():
        packed, state = quantised(recipe, f"{name}.weight", linear.shape)
        assert torch.equal(linear.packed_0, packed.view(-1))
        assert torch.equal(linear.absmax_0, state.absmax)
        _, absmax, _ = linear.packed_weight()
        assert torch.equal(absmax, bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset)


def test_a_lora_finds_every_linear(catalogue_of):
    shapes = dev()
    keys = comfy.lora.model_lora_keys_unet(build_transformer(catalogue_of(shapes)), {})
    for name, shape in shapes.items():
        if is_weight(name, shape):
            assert keys[f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"] == f"diffusion_model.{name}"
    assert keys["transformer.single_transformer_blocks.0.proj_out"] == "diffusion_model.single_blocks.0.linear2.weight"
    query, (axis, start, size) = keys["transformer.transformer_blocks.0.attn.to_k"]
    assert (query, axis, start, size) == ("diffusion_model.double_blocks.0.img_attn.qkv.weight", 0, 3072, 3072)


@pytest.mark.parametrize("layers", [1, 2])
def test_the_t5_has_as_many_layers_as_the_file(layers, catalogue_of):
    parts = (
        ("text_encoders.clip_l.", layout.clip_l(), "F16"),
        ("text_encoders.t5xxl.", layout.t5_xxl(layers), "F8_E4M3"),
        ("vae.", layout.vae(), "BF16"),
    )
    more = {prefix + name: (dtype, shape, None) for prefix, shapes, dtype in parts for name, shape in shapes.items()}
    catalogue = catalogue_of(dev(), more=more)
    assert catalogue.t5_layers == layers
    clip, _ = load_clip_and_vae(catalogue, [])
    assert len(clip.cond_stage_model.t5xxl.transformer.encoder.block) == layers
