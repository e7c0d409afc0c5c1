"""Files of diffusers, made by diffusers' own quantiser and saver: every weight is bit-equal to its dequantisation, and
ComfyUI's model with them computes what diffusers' model does."""

import functools
import json

import checkpoint_layout as layout
import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit as BnbLinear4bit
from diffusers import BitsAndBytesConfig, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer
from safetensors.torch import load_file, save_file

from flux_nf4.checkpoints import load_transformer, streamed
from flux_nf4.families import FLUX1
from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue
from flux_nf4.nf4_loader.linear.linear4bit import Linear4bit
from flux_nf4.nf4_loader.models.transformers import block_groups
from flux_nf4.offload.comfyui.modulation import modulation_in
from flux_nf4.offload.plan import Residency
from flux_nf4.offload.streamer import Streamer
from flux_nf4.page.file_plan import block_sizes

HIDDEN, DEPTH = 256, 2


@pytest.fixture(scope="module")
def dense_model(tmp_path_factory):
    """The folder of a tiny Flux of diffusers, in bf16."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=64,
        num_layers=DEPTH,
        num_single_layers=DEPTH,
        attention_head_dim=128,
        num_attention_heads=HIDDEN // 128,
        guidance_embeds=True,
    )
    folder = tmp_path_factory.mktemp("dense")
    model.bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantised(dense_model, tmp_path_factory):
    """A function: diffusers' own quantised model and the folder that diffusers saved it to, in shards."""

    @functools.cache
    def make(quant_type="nf4", double_quant=False, storage=torch.uint8, skip=()):
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant_type,
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_quant_storage=storage,
            llm_int8_skip_modules=list(skip),
        )
        with pytest.MonkeyPatch.context() as patch:
            # diffusers wants to see a GPU; the rest of it runs without.
            patch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda *_, **__: None)
            model = FluxTransformer2DModel.from_pretrained(
                dense_model, quantization_config=config, torch_dtype=torch.bfloat16, device_map={"": "cpu"}
            )
        folder = tmp_path_factory.mktemp("quantised")
        model.save_pretrained(folder, max_shard_size="1MB")
        assert len(list(folder.glob("*.safetensors"))) > 2
        return model, folder

    return make


def dequantised(module, dtype):
    """The weight of one of diffusers' modules, as bitsandbytes dequantises it."""
    if not isinstance(module, BnbLinear4bit):
        return module.weight.detach().to(dtype)
    state = module.weight.quant_state
    state.dtype = dtype
    return bnb.dequantize_4bit(module.weight.data, state)


def names_of_diffusers(name):
    """diffusers' modules for one of Black Forest Labs', by the table that the first test checks."""
    layout = FLUX1.layouts[1]
    tables = [("", "", layout.layers[""])]
    tables += [
        (f"{ours}.{i}.", f"{theirs}.{i}.", layout.layers[ours])
        for theirs, ours in layout.lists.items()
        for i in range(DEPTH)
    ]
    return next(
        [theirs_prefix + layer for layer in layers[name.removeprefix(prefix)]]
        for prefix, theirs_prefix, layers in tables
        if name.startswith(prefix) and name.removeprefix(prefix) in layers
    )


def check_every_weight(model, reference):
    """Each Linear's weight and bias are those of diffusers' modules, bit for bit, as what bitsandbytes computes."""
    linears = {name: m for name, m in model.diffusion_model.named_modules() if hasattr(m, "in_features")}
    assert len(linears) == 10 + DEPTH * 13
    for name, linear in linears.items():
        modules = [reference.get_submodule(part) for part in names_of_diffusers(name)]
        weight = torch.cat([dequantised(module, torch.bfloat16) for module in modules])
        bias = torch.cat([module.bias for module in modules]).detach()
        if name == "final_layer.adaLN_modulation.1":
            weight, bias = (torch.cat(tensor.chunk(2)[::-1]) for tensor in (weight, bias))
        got = linear.dequantise(torch.bfloat16) if isinstance(linear, Linear4bit) else linear.weight.bfloat16()
        assert torch.equal(got, weight), name
        assert torch.equal(linear.bias.bfloat16(), bias), name


def check_sizes(model, path):
    """What is said of the file before it is read is what the model takes."""
    catalogue = read_catalogue(path)
    sizes = block_sizes(catalogue, model.diffusion_model.dtype)
    groups = block_groups(model)
    ahead = modulation_in(model, [block for group in groups.values() for block in group])
    streamer = Streamer(groups, without={module for layer in ahead for module in layer.modules()})
    assert [size.nbytes for size in sizes] == [size.nbytes for size in streamer.sizes()]
    for name, module in model.diffusion_model.named_modules():
        tensor = catalogue.transformer.get(f"{name}.weight")
        if isinstance(module, Linear4bit) and len(tensor.weights4bit) == len(tensor.parts):
            assert tensor.ram_bytes == sum(buffer.nbytes for buffer in module.buffers()), name


def check_forward(model, reference, dense_model):
    """ComfyUI's forward is diffusers' own, with its dequantised weights in fp32."""
    dense = FluxTransformer2DModel.from_pretrained(dense_model, torch_dtype=torch.float32)
    for name, module in reference.named_modules():
        if isinstance(module, BnbLinear4bit):
            dense.get_submodule(name).weight.data = dequantised(module, torch.float32)
    generator = torch.Generator().manual_seed(1)
    latent, text = torch.randn(1, 16, 8, 8, generator=generator), torch.randn(1, 5, 4096, generator=generator)
    pooled, time, guidance = torch.randn(1, 768, generator=generator), torch.tensor([0.7]), torch.tensor([3.5])
    packed = latent.view(1, 16, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 16, 64)
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    places = torch.stack((torch.zeros(4, 4), rows, columns), dim=-1).view(16, 3)
    with torch.no_grad():
        wanted = dense(packed, text, pooled, time, places, torch.zeros(5, 3), guidance=guidance, return_dict=False)[0]
        got = model.diffusion_model(latent, time, text, pooled, guidance)
    got = got.view(1, 16, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 16, 64)
    assert wanted.std() > 0.01
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


def test_every_row_goes_where_the_converter_of_diffusers_takes_it_from(tmp_path):
    """Rows are numbers: diffusers' own converter takes them apart, the catalogue puts them back."""
    shapes = layout.flux(DEPTH, DEPTH, guidance=True)
    rows = {}
    for number, (name, shape) in enumerate(shapes.items()):
        numbers = torch.arange(shape[0], dtype=torch.float32) + number * 100_000
        rows[name] = numbers.view(-1, 1) if len(shape) == 2 else numbers
    converted = convert_flux_transformer_checkpoint_to_diffusers(dict(rows))
    path = tmp_path / "rows.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in converted.items()}, path)
    catalogue = read_catalogue(path)
    assert catalogue.found.layout.name == "diffusers"
    assert catalogue.transformer.keys() == rows.keys()
    stored = load_file(path)
    for name, tensor in catalogue.transformer.items():
        got = torch.cat([stored[part.name] for part in tensor.parts])
        if tensor.halves_swapped:
            got = got.roll(got.shape[0] // 2, 0)
        assert torch.equal(got, rows[name]), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"double_quant": True},
        {"quant_type": "fp4"},
        {"storage": torch.bfloat16},
        {"storage": torch.float16, "double_quant": True},
        {"storage": torch.float32},
        {"skip": ("x_embedder", "norm_out", "proj_out")},
    ],
    ids=["nf4", "nested", "fp4", "in bf16", "nested in fp16", "in fp32", "some layers dense"],
)
def test_a_model_that_diffusers_saved_is_the_same_model(options, quantised, read_model, dense_model):
    reference, folder = quantised(**options)
    model = read_model(folder)
    packed = [m for m in model.diffusion_model.modules() if isinstance(m, Linear4bit)]
    assert len(packed) == 10 + DEPTH * 13 - (1 + 1 + 1 + DEPTH if "skip" in options else 0)
    assert all(linear.is_one_weight for linear in packed)
    assert len([m for m in packed if m.parts[0].nested]) == (
        "double_quant" in options and len(packed) - 1
    )  # not norm_out
    check_sizes(model, folder)
    check_every_weight(model, reference)
    check_forward(model, reference, dense_model)


def test_the_same_model_is_read_however_it_is_named(quantised, read_model):
    reference, folder = quantised()
    pipeline = folder.parent / "pipeline"
    pipeline.mkdir(exist_ok=True)
    if not (pipeline / "transformer").exists():
        (pipeline / "transformer").symlink_to(folder)
    shards = sorted(folder.glob("*.safetensors"))
    (index,) = folder.glob("*.index.json")
    for path in (pipeline, shards[0], shards[-1], index):
        check_every_weight(read_model(path), reference)


def test_shards_need_no_index(quantised, read_model, tmp_path):
    reference, folder = quantised()
    for shard in folder.glob("*.safetensors"):
        (tmp_path / shard.name).symlink_to(shard)
    check_every_weight(read_model(next(tmp_path.iterdir())), reference)


def test_a_layer_whose_quant_state_is_in_another_shard_is_read(quantised, read_model, tmp_path):
    reference, folder = quantised(double_quant=True)
    tensors = {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    places = {}
    for number in (1, 2, 3):
        part = dict(sorted(tensors.items(), key=lambda item: hash(item[0][::-1]))[number - 1 :: 3])
        name = f"model-{number:05}-of-00003.safetensors"
        save_file(part, tmp_path / name)
        places |= dict.fromkeys(part, name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    check_every_weight(read_model(tmp_path), reference)


def test_parts_that_are_quantised_in_different_ways_stay_as_they_are(quantised, read_model, tmp_path, dense_model):
    """q in nested NF4, k in nested FP4, v dense or as q: one Linear of parts, and no part loses a bit."""
    reference, folder = quantised(double_quant=True)
    tensors = {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    other, other_folder = quantised(quant_type="fp4", double_quant=True)
    fp4 = {name: tensor for shard in other_folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    dense = load_file(next(dense_model.glob("*.safetensors")))
    mixed = dict(reference.named_modules())
    for to_k in ("transformer_blocks.0.attn.to_k", "single_transformer_blocks.1.attn.to_k"):
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(to_k)}
        tensors |= {name: tensor for name, tensor in fp4.items() if name.startswith(to_k)}
        mixed[to_k] = other.get_submodule(to_k)
    to_v = "transformer_blocks.0.attn.to_v"
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(to_v)}
    tensors |= {name: tensor for name, tensor in dense.items() if name.startswith(to_v)}
    mixed[to_v] = FluxTransformer2DModel.from_pretrained(dense_model).bfloat16().get_submodule(to_v)
    path = tmp_path / "mixed.safetensors"
    save_file(tensors, path)
    model = read_model(path)
    linears = {name: m for name, m in model.diffusion_model.named_modules() if isinstance(m, Linear4bit)}
    of_parts = {name: m for name, m in linears.items() if not m.is_one_weight}
    assert list(of_parts) == ["double_blocks.0.img_attn.qkv", "single_blocks.1.linear1"]
    assert not any(getattr(part, "nested", ()) for linear in of_parts.values() for part in linear.parts)
    check_sizes(model, path)

    class Mixed:
        get_submodule = staticmethod(mixed.__getitem__)
        named_modules = staticmethod(mixed.items)

    check_every_weight(model, Mixed)
    check_forward(model, Mixed, dense_model)


def test_parts_of_which_only_some_are_nested_are_one_weight(quantised, read_model, tmp_path, dense_model):
    reference, folder = quantised(double_quant=True)
    other, other_folder = quantised()
    tensors = {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    plain = {name: tensor for shard in other_folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    to_k = "transformer_blocks.0.attn.to_k"
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(to_k)}
    save_file(tensors | {name: t for name, t in plain.items() if name.startswith(to_k)}, tmp_path / "mixed.safetensors")
    model = read_model(tmp_path / "mixed.safetensors")
    assert not model.diffusion_model.double_blocks[0].img_attn.qkv.parts[0].nested
    check_sizes(model, tmp_path / "mixed.safetensors")
    modules = dict(reference.named_modules()) | {to_k: other.get_submodule(to_k)}

    class Mixed:
        get_submodule = staticmethod(modules.__getitem__)
        named_modules = staticmethod(modules.items)

    check_every_weight(model, Mixed)
    check_forward(model, Mixed, dense_model)


def test_a_linear_of_parts_is_streamed_as_a_resident_one_computes(quantised, read_model, sample, copies, tmp_path):
    """Blocks of one kind with different records, from the host and resident: the same latents."""
    _, folder = quantised(double_quant=True)
    _, other_folder = quantised(quant_type="fp4")
    tensors = {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    fp4 = {name: tensor for shard in other_folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    to_k = "transformer_blocks.0.attn.to_k"
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(to_k)}
    tensors |= {name: tensor for name, tensor in fp4.items() if name.startswith(to_k)}
    path = tmp_path / "mixed.safetensors"
    save_file(tensors, path)
    read_model(path)
    catalogue = read_catalogue(path)
    latents = [
        sample(streamed(load_transformer(catalogue), Residency((("double", count), ("single", count))), None))
        for count in (0, 1, DEPTH)
    ]
    assert copies.nbytes > 0
    assert torch.equal(latents[0], latents[1])
    assert torch.equal(latents[0], latents[2])
