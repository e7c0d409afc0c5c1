"""Catalogues: each layout in the wild is read, and every other file is refused with the reason."""

import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flux_nf4.families.encoders import encoder_names
from flux_nf4.nf4_loader.checkpoint.catalogue import TransformerTensor, Weight4bit, read_catalogue
from flux_nf4.nf4_loader.checkpoint.errors import CheckpointError
from flux_nf4.nf4_loader.checkpoint.quant_state import NestedAbsmax, QuantState
from flux_nf4.nf4_loader.checkpoint.require import require_all_in_one, require_transformer

QKV = "double_blocks.0.img_attn.qkv.weight"
LINEARS = {
    "img_in.weight": (16, 64),
    QKV: (48, 128),
    "double_blocks.0.img_mlp.0.weight": (16, 96),
    "single_blocks.0.linear1.weight": (24, 320),
    "final_layer.linear.weight": (64, 16),
}
NORM = "double_blocks.0.img_attn.norm.query_norm"
PREFIX = "model.diffusion_model."
KNOWN = "Chroma, Flux 2, Flux.1, Ideogram 4, Krea 2 or Qwen-Image"
QUANT_STATE = ".quant_state.bitsandbytes__"
ENCODERS = {
    "text_encoders.clip_l.transformer.text_model.embeddings.position_embedding.weight": torch.ones(7, 8).half(),
    **{
        f"text_encoders.t5xxl.transformer.encoder.block.{index}.layer.{layer}.layer_norm.weight": torch.ones(8)
        for index in (0, 1, 2, 10)
        for layer in (0, 1)
    },
    "text_encoders.t5xxl.transformer.shared.weight": torch.ones(3, 8).to(torch.float8_e4m3fn),
}
VAE = {"vae.decoder.conv_in.weight": torch.ones(2, 2, 3, 3).bfloat16()}


@pytest.fixture
def make_tensors(quantise):
    """A function that makes the tensors of a tiny all-in-one file; those in ``dense`` are left in bf16."""

    def make(prefix=PREFIX, quant_type="nf4", blocksize=64, nested=False, dense=(), norm="scale", rest=ENCODERS | VAE):
        transformer = {"img_in.bias": torch.ones(16).bfloat16(), f"{NORM}.{norm}": torch.ones(128).bfloat16()}
        for name, shape in LINEARS.items():
            if name in dense:
                transformer[name] = torch.ones(shape).bfloat16()
                continue
            transformer[name], state = quantise(shape, quant_type, blocksize, nested, torch.bfloat16)
            state.shape = torch.Size(shape)
            transformer |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
        return {prefix + name: tensor for name, tensor in transformer.items()} | rest

    return make


@pytest.fixture
def save(tmp_path):
    """A function that writes tensors to a file."""

    def save(tensors, name="flux.safetensors"):
        path = tmp_path / name
        save_file(tensors, path)
        return path

    return save


@pytest.fixture
def refusal(save):
    """A function that gives the message with which a file of these tensors is refused."""

    def refuse(tensors):
        path = save(tensors)
        with pytest.raises(CheckpointError) as caught:
            require_transformer(read_catalogue(path))
        message = str(caught.value)
        assert message.startswith("flux.safetensors: ")
        return message

    return refuse


def weights4bit(catalogue):
    """The packed weights of a file with Black Forest Labs' names, where each is one tensor of the model."""
    parts = {name: part for name, tensor in catalogue.transformer.items() for part in tensor.parts}
    return {name: part for name, part in parts.items() if isinstance(part, Weight4bit)}


def dense(catalogue):
    return {name: tensor.parts[0] for name, tensor in catalogue.transformer.items() if not tensor.weights4bit}


def check_bytes(path, entry, tensor):
    stored = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    assert path.read_bytes()[entry.offset : entry.offset + entry.nbytes] == stored


# What is read


@pytest.mark.parametrize("prefix", [PREFIX, ""], ids=["prefix", "no prefix"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False], ids=["v1", "v2"])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_every_weight_is_found_with_its_state_and_bytes(make_tensors, save, prefix, quant_type, nested, blocksize):
    tensors = make_tensors(prefix, quant_type, blocksize, nested)
    path = save(tensors)
    catalogue = read_catalogue(path)
    assert catalogue.path == path
    assert weights4bit(catalogue).keys() == LINEARS.keys()
    for name, weight in weights4bit(catalogue).items():
        assert weight.state.shape == LINEARS[name]
        assert (weight.state.quant_type, weight.state.blocksize) == (quant_type, blocksize)
        full = prefix + name
        check_bytes(path, weight.packed, tensors[full])
        check_bytes(path, weight.absmax, tensors[f"{full}.absmax"])
        check_bytes(path, weight.quant_map, tensors[f"{full}.quant_map"])
        if nested:
            fields = json.loads(bytes(tensors[f"{full}{QUANT_STATE}{quant_type}"].tolist()))
            count = tensors[f"{full}.absmax"].numel()
            assert weight.state.nested == (NestedAbsmax(count, 256),)
            assert weight.state.nested_offset == fields["nested_offset"]
            assert weight.state.nested[0].blocks == tensors[f"{full}.nested_absmax"].numel()
            check_bytes(path, weight.nested_absmax, tensors[f"{full}.nested_absmax"])
            check_bytes(path, weight.nested_map, tensors[f"{full}.nested_quant_map"])
        else:
            assert weight.state.nested == ()
            assert weight.nested_absmax is None
            assert weight.nested_map is None


@pytest.mark.parametrize(
    ("rows", "stays"),
    [((128, 128, 3), True), ((3,), True), ((64, 128), False), ((125, 128), False)],
    ids=["whole", "one part of any size", "scales end off 16 bytes", "codes end off 16 bytes"],
)
def test_absmax_stays_nested_where_each_part_begins_on_16_bytes(rows, stays):
    states = [QuantState("nf4", 64, (count, 512), (NestedAbsmax(8 * count, 256),)) for count in rows]
    tensor = TransformerTensor(tuple(Weight4bit(state, *[None] * 6) for state in states))
    assert tensor.fused is not None
    assert tensor.nested == (tuple(nested for state in states for nested in state.nested) if stays else ())


@pytest.mark.parametrize("prefix", [PREFIX, ""], ids=["prefix", "no prefix"])
def test_the_parts_are_told_apart(make_tensors, save, prefix):
    catalogue = read_catalogue(save(make_tensors(prefix)))
    assert dense(catalogue).keys() == {"img_in.bias", f"{NORM}.scale"}
    assert catalogue.text_encoders.keys() == ENCODERS.keys()
    assert catalogue.vae.keys() == VAE.keys()
    assert catalogue.header.tensors.keys() >= {f"{prefix}{QKV}", *ENCODERS, *VAE}


def test_logical_shapes_are_those_of_the_dense_model(make_tensors, save):
    catalogue = read_catalogue(save(make_tensors(nested=True)))
    assert catalogue.logical_shapes == LINEARS | {"img_in.bias": (16,), f"{NORM}.scale": (128,)}


@pytest.mark.parametrize("norm", ["scale", "weight"])
def test_norms_have_one_name_whatever_the_file_calls_them(make_tensors, save, norm):
    tensors = make_tensors(norm=norm)
    path = save(tensors)
    catalogue = read_catalogue(path)
    assert f"{NORM}.scale" in dense(catalogue)
    assert f"{NORM}.weight" not in dense(catalogue)
    check_bytes(path, dense(catalogue)[f"{NORM}.scale"], tensors[f"{PREFIX}{NORM}.{norm}"])


def test_dense_layers_beside_quantised_ones_stay_dense(make_tensors, save):
    unpacked = {"img_in.weight", "final_layer.linear.weight"}
    catalogue = read_catalogue(save(make_tensors(dense=unpacked)))
    assert weights4bit(catalogue).keys() == LINEARS.keys() - unpacked
    assert dense(catalogue).keys() == unpacked | {"img_in.bias", f"{NORM}.scale"}
    assert catalogue.logical_shapes["img_in.weight"] == (16, 64)


def test_the_first_block_may_be_dense(make_tensors, save):
    catalogue = read_catalogue(save(make_tensors(dense={QKV})))
    assert dense(catalogue)[QKV].dtype == "BF16"


def test_a_weight_stored_as_one_row_is_read(make_tensors, save):
    tensors = make_tensors()
    tensors[PREFIX + QKV] = tensors[PREFIX + QKV].view(1, -1)
    assert weights4bit(read_catalogue(save(tensors)))[QKV].packed.nbytes == 48 * 64


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32], ids=str)
def test_a_weight_stored_in_another_dtype_is_read(make_tensors, save, storage):
    tensors = make_tensors()
    tensors[PREFIX + QKV] = tensors[PREFIX + QKV].view(-1).view(storage).view(-1, 1)
    assert weights4bit(read_catalogue(save(tensors)))[QKV].packed.nbytes == 48 * 64


def test_t5_layers_are_counted(make_tensors, save):
    assert read_catalogue(save(make_tensors())).t5_layers == 4
    assert read_catalogue(save(make_tensors(rest={}))).t5_layers == 0


# All-in-one


def test_an_all_in_one_file_is_complete(make_tensors, save):
    require_all_in_one(read_catalogue(save(make_tensors())))


@pytest.mark.parametrize(
    ("kept", "missing"),
    [
        ((), "no CLIP-L, no T5-XXL, no VAE ("),
        (("vae.",), "no CLIP-L, no T5-XXL ("),
        (("text_encoders.",), "no VAE ("),
        (("text_encoders.clip_l.", "vae."), "no T5-XXL ("),
        (("text_encoders.t5xxl.", "vae."), "no CLIP-L ("),
        (("text_encoders.clip_l.", "text_encoders.t5xxl.transformer.shared", "vae."), "no T5-XXL ("),
    ],
)
def test_a_file_that_is_not_all_in_one_is_refused_with_what_is_missing(make_tensors, save, kept, missing):
    rest = {name: tensor for name, tensor in (ENCODERS | VAE).items() if name.startswith(kept)}
    catalogue = read_catalogue(save(make_tensors(rest=rest)))
    with pytest.raises(CheckpointError) as caught:
        require_all_in_one(catalogue)
    message = str(caught.value)
    assert message.startswith(f"flux.safetensors: it has the Flux transformer but {missing}")
    assert "'DualCLIPLoader'" in message
    assert "'Load VAE'" in message


# Files of another kind


def dense_flux(dtype, prefix=PREFIX):
    return {prefix + name: torch.ones(shape).to(dtype) for name, shape in LINEARS.items()}


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float8_e4m3fn, "F8_E4M3")]
)
@pytest.mark.parametrize(
    ("rest", "loader"),
    [
        (ENCODERS | VAE, "'Load Checkpoint' (folder checkpoints)"),
        ({}, "'Load Diffusion Model' (folder diffusion_models)"),
    ],
)
@pytest.mark.parametrize("prefix", [PREFIX, ""], ids=["prefix", "no prefix"])
def test_a_dense_flux_is_refused_with_its_loader(refusal, dtype, name, rest, loader, prefix):
    message = refusal(dense_flux(dtype, prefix) | rest)
    assert f"it is a Flux.1 model with dense {name} weights" in message
    assert f"Load it with {loader} and stream it with 'Stream Model Blocks', or make an NF4 file" in message


def test_a_gguf_file_is_refused_with_its_loader(tmp_path):
    path = tmp_path / "flux1-dev-Q4_0.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + bytes(100))
    with pytest.raises(CheckpointError, match=r"^flux1-dev-Q4_0\.gguf: this is a GGUF file\. .*ComfyUI-GGUF"):
        read_catalogue(path)


@pytest.mark.parametrize("mark", [".SCB", ".weight_format"])
def test_llm_int8_is_refused(refusal, mark):
    tensors = {name: torch.ones(shape, dtype=torch.int8) for name, shape in LINEARS.items()}
    tensors[QKV.removesuffix(".weight") + mark] = torch.ones(48)
    assert "its weights are 8-bit LLM.int8 of bitsandbytes ('.SCB' tensors), not NF4 or FP4" in refusal(tensors)


def renamed(tensors, old, new):
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


def test_4bit_of_another_model_is_refused_with_its_names(make_tensors, refusal):
    tensors = {n: t for n, t in make_tensors("", rest={}).items() if n.startswith("double_blocks")}
    message = refusal(renamed(tensors, "double_blocks.0", "model.layers.10") | {"model.layers.2.a": torch.ones(1)})
    assert f"a bitsandbytes 4-bit file, but not of a model that this node loads ({KNOWN})" in message
    assert "its first names are model.layers.2.a, model.layers.10." in message


def of_other_models(*names):
    return {name: torch.ones(4, 4).half() for name in names}


OTHERS = {
    "a LoRA of kohya": (
        of_other_models("lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"),
        ("it is a LoRA", "models/loras", "'LoraLoaderModelOnly'"),
    ),
    "a LoRA of diffusers": (
        of_other_models("transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight"),
        ("it is a LoRA",),
    ),
    "a LoRA of XLabs": (
        of_other_models("double_blocks.0.processor.proj_lora1.down.weight"),
        ("it is a LoRA", "models/loras", "'LoraLoaderModelOnly'"),
    ),
    "a ControlNet of XLabs": (
        of_other_models("double_blocks.0.img_attn.qkv.weight", "controlnet_blocks.0.weight", "img_in.weight"),
        ("it is a ControlNet", "'Load ControlNet Model'"),
    ),
    "a ControlNet of InstantX": (
        of_other_models(
            *(f"single_transformer_blocks.0.{layer}.weight" for layer in ("attn.to_q", "attn.to_k", "attn.to_v")),
            "single_transformer_blocks.0.proj_mlp.weight",
            "controlnet_mode_embedder.weight",
        ),
        ("it is a ControlNet", "'Load ControlNet Model'"),
    ),
    "an IP-adapter": (
        of_other_models("double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"),
        ("it is an IP-adapter", "x-flux-comfyui"),
    ),
    "a VAE of diffusers": (
        of_other_models("encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.conv_in.weight"),
        ("it is a VAE", "'Load VAE'"),
    ),
    "a VAE": (of_other_models("decoder.conv_in.weight"), ("it is a VAE", "'Load VAE'")),
    "the VAE of an all-in-one file": (VAE, ("it is a VAE", "'Load VAE'")),
    "a T5": (
        of_other_models("encoder.block.0.layer.0.SelfAttention.q.weight"),
        ("it is a T5 text encoder", "'DualCLIPLoader'"),
    ),
    "a CLIP-L": (
        of_other_models("text_model.encoder.layers.0.mlp.fc1.weight"),
        ("it is a CLIP text encoder", "'DualCLIPLoader'"),
    ),
    "SDXL": (
        of_other_models("model.diffusion_model.input_blocks.0.0.weight"),
        ("it is a Stable Diffusion or SDXL model", "'Load Checkpoint'"),
    ),
    "SD 3.5": (
        of_other_models("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"),
        ("it is a Stable Diffusion 3 model", "'Load Checkpoint'"),
    ),
    "SD 3.5 of diffusers": (
        of_other_models("transformer_blocks.0.attn.to_q.weight", "pos_embed.proj.weight"),
        ("it is a model in the layout of diffusers",),
    ),
    "nunchaku": (
        of_other_models("single_transformer_blocks.0.proj_mlp.qweight", "single_transformer_blocks.0.proj_mlp.wscales"),
        ("nunchaku (SVDQuant)", "'Nunchaku FLUX DiT Loader' of the ComfyUI-nunchaku package"),
    ),
    "torchao": (
        of_other_models("double_blocks.0.img_attn.qkv._weight_qdata"),
        ("quantised by torchao", "pick an NF4 file"),
    ),
    "fp8 or NVFP4 of ComfyUI": (
        of_other_models("double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_attn.qkv.comfy_quant"),
        ("in a format of ComfyUI's own", "'Load Diffusion Model'"),
    ),
    "a T5 in a format of ComfyUI": (
        of_other_models(
            "encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.block.0.layer.0.SelfAttention.q.comfy_quant"
        ),
        ("in a format of ComfyUI's own", "Load it with 'DualCLIPLoader' (type flux), of a ComfyUI that is new enough"),
    ),
    "a language model": (
        of_other_models("model.layers.0.mlp.up_proj.weight"),
        ("it is a language model (a text encoder)", "'Load CLIP' (folder text_encoders)"),
    ),
}


@pytest.mark.parametrize(("tensors", "fragments"), OTHERS.values(), ids=OTHERS)
def test_another_file_is_refused_with_what_it_is_and_its_loader(refusal, tensors, fragments):
    message = refusal(tensors)
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize(
    ("place", "mark", "kind"),
    [
        ("single_transformer_blocks.0.proj_mlp", "distilled_guidance_layer.in_proj.weight", "a Chroma model"),
    ],
)
def test_a_relative_in_the_layout_of_diffusers_is_refused_with_the_one_that_is_loaded(
    make_tensors, refusal, place, mark, kind
):
    tensors = {n: t for n, t in make_tensors("", rest={}).items() if n.startswith("double_blocks.0.img_attn.qkv")}
    message = refusal(renamed(tensors, "double_blocks.0.img_attn.qkv", place) | {mark: torch.ones(2)})
    assert f"it is {kind} in the layout of diffusers, in 4 bits of bitsandbytes" in message
    assert "files in the names of Black Forest Labs ('double_blocks.0.*')" in message


@pytest.mark.parametrize("scale", ["scale_weight", "weight_scale"])
def test_scaled_fp8_beside_4bit_is_refused_and_not_taken_for_plain_fp8(make_tensors, refusal, scale):
    message = refusal(make_tensors() | {f"{PREFIX}img_in.{scale}": torch.ones(())})
    assert f"img_in.{scale}: some of its layers are in 4 bits and others in scaled fp8" in message
    assert "commands/quantise.py" in message


@pytest.mark.parametrize(
    ("name", "kind", "loader"),
    [
        ("model.diffusion_model.input_blocks.0", "a Stable Diffusion or SDXL model", "a loader for that model"),
        ("joint_blocks.0", "a Stable Diffusion 3 model", "a loader for that model"),
        ("transformer_blocks.0", "a model in the layout of diffusers", "a loader for that model"),
        ("model.layers.0.self_attn", "a language model", "a loader for that model"),
        ("model.language_model.layers.0.mlp", "a language model", "a loader for that model"),
        ("text_model.encoder.layers.0.mlp", "a CLIP text encoder", "a loader for that model"),
        ("encoder.block.0.layer.0.SelfAttention", "a T5 text encoder", "a loader for that model"),
    ],
)
def test_4bit_of_another_model_is_refused_with_what_it_is(make_tensors, refusal, name, kind, loader):
    tensors = {n: t for n, t in make_tensors("", rest={}).items() if n.startswith("double_blocks")}
    message = refusal(renamed(tensors, "double_blocks.0", name))
    assert f"4-bit file, but not of a model that this node loads ({KNOWN}): it is {kind}" in message
    assert loader in message


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_norm",
        "language_model.model.layers.0.post_attention_layernorm",
        "encoder.block.0.layer.0.SelfAttention.q",
        "text_model.encoder.layers.0.mlp.fc1",
    ],
)
def test_a_4bit_text_encoder_is_refused_with_its_node(make_tensors, refusal, name):
    layer = "double_blocks.0.img_attn.qkv"
    tensors = {n: t for n, t in make_tensors("", rest={}).items() if n.startswith(layer)}
    message = refusal(renamed(tensors, layer, name))
    assert "it is a text encoder in 4 bits, and no transformer" in message
    assert "models/text_encoders" in message
    assert f"If it is {encoder_names()}" in message
    assert "'Load 4-bit Text Encoder (streamed)'" in message


@pytest.mark.parametrize("tensors", [{"a.weight": torch.ones(4, 4)}, {}])
def test_a_file_without_a_flux_transformer_is_refused(refusal, tensors):
    assert f"it holds no transformer of {KNOWN} (such as 'double_blocks.0.*')" in refusal(tensors)


def test_4bit_text_encoders_do_not_make_a_dense_flux_4bit(make_tensors, refusal):
    encoder = {f"text_encoders.t5xxl.{name}": tensor for name, tensor in make_tensors("", rest={}).items()}
    assert "it is a Flux.1 model with dense BF16 weights" in refusal(dense_flux(torch.bfloat16) | encoder)


# 4-bit Flux files that are damaged


def test_packed_weights_without_any_quant_state_are_refused(make_tensors, refusal):
    tensors = {name: tensor for name, tensor in make_tensors().items() if QUANT_STATE not in name}
    message = refusal(tensors)
    assert f"{PREFIX}{QKV} is packed (U8 of shape (3072, 1)) but no quant state" in message


def test_packed_weights_alone_are_refused(make_tensors, refusal):
    packed = make_tensors()[PREFIX + QKV]
    assert f"{QKV} is packed (U8 of shape (3072, 1)) but no quant state" in refusal({QKV: packed})


def quant_state(**changes):
    fields = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [48, 128]} | changes
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


STATE = f"{QUANT_STATE}nf4"
DESCRIBED = "its quant state says (48, 128) in nf4 with blocksize 64"
# What is put in the place of which tensor of one weight (None: it is taken out), and what the message says.
DAMAGE = {
    "quant state missing": (
        STATE,
        None,
        f"it is packed, but '{QKV}{STATE}', which gives its shape, is not in the file",
    ),
    "quant state not JSON": (STATE, torch.ones(80, dtype=torch.uint8), "its quant state is not readable as JSON"),
    "quant state in a hole": (STATE, torch.zeros(80, dtype=torch.uint8), "its quant state is all zeros"),
    "quant state of another type": (
        STATE,
        quant_state(quant_type="int8"),
        "its quant state says quant_type 'int8'; known are nf4 and fp4",
    ),
    "quant state without shape": (STATE, quant_state(shape=None), "its quant state says shape None, not the [out, in]"),
    "quant state of another blocksize": (
        STATE,
        quant_state(blocksize=128),
        "in nf4 with blocksize 128, which needs 48 F32 values of absmax; the file has 96 of F32",
    ),
    "larger shape": (
        STATE,
        quant_state(shape=[48, 130]),
        "its quant state says (48, 130) in nf4 with blocksize 64, which is 3,120 bytes; the file has 3,072",
    ),
    "smaller shape": (STATE, quant_state(shape=[48, 64]), "which is 1,536 bytes; the file has 3,072"),
    "packed bytes missing": ("", None, f"'{QKV}' is not in the file"),
    "packed bytes too few": (
        "",
        torch.ones(3071, 1, dtype=torch.uint8),
        f"{DESCRIBED}, which is 3,072 bytes; the file has 3,071",
    ),
    "absmax missing": (".absmax", None, f"'{QKV}.absmax' is not in the file"),
    "absmax too short": (
        ".absmax",
        torch.ones(95),
        f"{DESCRIBED}, which needs 96 F32 values of absmax; the file has 95 of F32",
    ),
    "absmax too long": (".absmax", torch.ones(97), "needs 96 F32 values of absmax; the file has 97 of F32"),
    "absmax in fp16": (".absmax", torch.ones(96).half(), "needs 96 F32 values of absmax; the file has 96 of F16"),
    "absmax nested, state not": (
        ".absmax",
        torch.ones(96, dtype=torch.uint8),
        "needs 96 F32 values of absmax; the file has 96 of U8",
    ),
    "quant_map missing": (".quant_map", None, f"'{QKV}.quant_map' is not in the file"),
    "quant_map too short": (".quant_map", torch.ones(15), "needs 16 F32 values of quant_map; the file has 15 of F32"),
    "quant_map in fp16": (".quant_map", torch.ones(16).half(), "16 F32 values of quant_map; the file has 16 of F16"),
}
NESTED_DAMAGE = {
    "absmax in fp32": (".absmax", torch.ones(96), "which needs 96 U8 values of absmax; the file has 96 of F32"),
    "nested_absmax missing": (".nested_absmax", None, f"'{QKV}.nested_absmax' is not in the file"),
    "nested_absmax too long": (
        ".nested_absmax",
        torch.ones(2),
        "which needs 1 F32 values of nested_absmax; the file has 2 of F32",
    ),
    "nested_absmax in fp16": (".nested_absmax", torch.ones(1).half(), "1 F32 values of nested_absmax"),
    "nested_quant_map missing": (".nested_quant_map", None, f"'{QKV}.nested_quant_map' is not in the file"),
    "nested_quant_map too short": (
        ".nested_quant_map",
        torch.ones(255),
        "which needs 256 F32 values of nested_quant_map; the file has 255 of F32",
    ),
    "nested_offset missing": (STATE, quant_state(nested_blocksize=256), "its quant state says nested_offset None"),
    "nested_blocksize too large": (
        STATE,
        quant_state(nested_blocksize=1 << 40, nested_offset=1.0),
        "its quant state says nested_blocksize 1099511627776",
    ),
}


def check_damage_is_refused(tensors, damage, refusal, prefix):
    part, replacement, reason = damage
    name = f"{prefix}{QKV}{part}"
    assert name in tensors
    del tensors[name]
    if replacement is not None:
        tensors[name] = replacement
    message = refusal(tensors)
    assert message.startswith(f"flux.safetensors: {prefix}{QKV}: ")
    assert reason.replace(f"'{QKV}", f"'{prefix}{QKV}") in message
    assert "The file is damaged or was made by a tool that this node does not know" in message


@pytest.mark.parametrize("prefix", [PREFIX, ""], ids=["prefix", "no prefix"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_weight_is_refused_by_name(make_tensors, refusal, damage, prefix):
    check_damage_is_refused(make_tensors(prefix), damage, refusal, prefix)


@pytest.mark.parametrize("damage", NESTED_DAMAGE.values(), ids=NESTED_DAMAGE)
def test_a_damaged_nested_weight_is_refused_by_name(make_tensors, refusal, damage):
    check_damage_is_refused(make_tensors(nested=True), damage, refusal, PREFIX)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8], ids=str)
def test_bytes_that_nothing_describes_are_refused(make_tensors, refusal, dtype):
    tensors = make_tensors(dense={"img_in.weight"})
    tensors[f"{PREFIX}img_in.weight"] = torch.ones(512, 1, dtype=dtype)
    message = refusal(tensors)
    assert (
        f"{PREFIX}img_in.weight: it is packed, but '{PREFIX}img_in.weight{STATE}', which gives its shape, is not"
        in message
    )


def test_an_absmax_that_nothing_describes_is_refused(make_tensors, refusal):
    tensors = make_tensors()
    tensors[PREFIX + QKV] = tensors[PREFIX + QKV].view(-1).view(torch.bfloat16).view(-1, 1)
    del tensors[f"{PREFIX}{QKV}{STATE}"]
    assert f"it is packed, but '{PREFIX}{QKV}{STATE}', which gives its shape, is not" in refusal(tensors)


class CountedFile(io.FileIO):
    """A file that remembers how many bytes were asked of it."""

    bytes_read = 0

    def read(self, size=-1):
        data = super().read(size)
        CountedFile.bytes_read += len(data)
        return data

    def readinto(self, buffer):
        count = super().readinto(memoryview(buffer)[:16])  # as some network mounts give few bytes at once
        CountedFile.bytes_read += count
        return count


def test_only_header_and_quant_states_are_read(make_tensors, save, monkeypatch):
    path = save(make_tensors(nested=True))
    monkeypatch.setattr(CountedFile, "bytes_read", 0)
    monkeypatch.setattr(Path, "open", lambda self, mode, **_: CountedFile(self, mode))
    entries = read_catalogue(path).header.tensors
    header_bytes = min(entry.offset for entry in entries.values())
    state_bytes = sum(entry.nbytes for name, entry in entries.items() if QUANT_STATE in name)
    assert CountedFile.bytes_read == header_bytes + state_bytes
