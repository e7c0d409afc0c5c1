"""Saving: what is made of each kind of model, what stays byte for byte, and what an early end leaves behind."""

import json
import resource
import subprocess
import sys
from dataclasses import replace

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import environment
import folder_paths
import gguf
import pytest
import quantise as quantise_command
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Params4bit
from diffusers import BitsAndBytesConfig, FluxTransformer2DModel
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer
from gguf_model import load_gguf
from make_checkpoint import Recipe, make_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saved_files import HIDDEN, SHAPES, WEIGHTS, check, dequantised, requantised, values, write_gguf
from scaled_fp8 import load_scaled_fp8

from flux_nf4 import nodes, nodes_saving
from flux_nf4.families import FLUX1
from flux_nf4.nf4_loader.checkpoint.errors import CheckpointError
from flux_nf4.nf4_loader.saving.model_sources import sources_of_model
from flux_nf4.nf4_loader.saving.quantise import QuantSettings
from flux_nf4.nf4_loader.saving.save import save_quantised
from flux_nf4.nf4_loader.saving.sources import sources_of_file

V2 = QuantSettings()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def dense(folder):
    path = folder / "dense.safetensors"
    save_file(values(), path)
    return path


@pytest.fixture(scope="module")
def diffusers_model():
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=128, num_attention_heads=2, guidance_embeds=True
    ).bfloat16()


def save(source, path, settings=V2, **options):
    save_quantised(path, sources_of_file(source, all_in_one=False), settings, **options)
    return load_file(path)


# What is made of each kind of file


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_dense_file_becomes_what_bitsandbytes_makes_of_it(dense, tmp_path, quant_type, nested):
    settings = QuantSettings(quant_type, nested)
    check(save(dense, tmp_path / "made.safetensors", settings), values(), settings)


def test_fp16_stays_the_dtype_that_other_tools_dequantise_to(folder, tmp_path):
    save_file(values(torch.float16), folder / "fp16.safetensors")
    tensors = save(folder / "fp16.safetensors", tmp_path / "made.safetensors")
    check(tensors, values(torch.float16))
    assert dequantised(tensors, "img_in.weight").dtype == torch.float16


def test_fp8_is_quantised_from_its_values(folder, tmp_path):
    fp8 = {n: v.to(torch.float8_e4m3fn) if n in WEIGHTS else v for n, v in values().items()}
    save_file(fp8, folder / "fp8.safetensors")
    check(save(folder / "fp8.safetensors", tmp_path / "made.safetensors"), {n: v.bfloat16() for n, v in fp8.items()})


def scaled(tensors, scales, of=lambda name: name):
    """``tensors`` as scaled fp8: each of ``scales`` beside its weight, and what they read as."""
    stored = dict(tensors, scaled_fp8=torch.zeros(0, dtype=torch.float8_e4m3fn))
    read = {}
    for name, scale in scales.items():
        stored[name] = tensors[name].to(torch.float8_e4m3fn)
        stored[name.removesuffix("weight") + of("scale_weight")] = scale
        read[name] = (stored[name].float() * scale.view(-1, 1)).bfloat16()
    return stored, tensors | read


@pytest.mark.parametrize("of", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("rows", [False, True], ids=["one a weight", "one a row"])
def test_scaled_fp8_is_quantised_from_its_scaled_values(folder, tmp_path, of, rows):
    scales = {name: torch.linspace(2, 5, SHAPES[name][0] if rows else 1) for name in sorted(WEIGHTS)}
    stored, expected = scaled(values(), scales, lambda _: of)
    save_file(stored, folder / "scaled.safetensors")
    check(save(folder / "scaled.safetensors", tmp_path / "made.safetensors"), expected)


def test_scaled_fp8_of_diffusers_is_quantised_with_the_scale_of_each_part(diffusers_model, tmp_path):
    """q, k and v, which become one weight, have a scale each."""
    state = diffusers_model.state_dict()
    names = [name for name, tensor in state.items() if tensor.dim() == 2]
    scales = {name: torch.tensor(1 + number / 8) for number, name in enumerate(names)}
    stored, read = scaled({name: tensor.clone() for name, tensor in state.items()}, scales)
    save_file(stored, tmp_path / "diffusers.safetensors")
    tensors = save(tmp_path / "diffusers.safetensors", tmp_path / "made.safetensors")
    check(tensors, joined(read))


def joined(state):
    """Tensors of diffusers, in Black Forest Labs' names and order."""
    parts = {}
    for name, tensor in state.items():
        place = FLUX1.place(FLUX1.layouts[1], name)
        parts.setdefault((place.name, place.halves_swapped), {})[place.part] = tensor
    stacked = {key: torch.cat([of[part] for part in sorted(of)]) for key, of in parts.items()}
    return {
        name: torch.cat(tensor.chunk(2)[::-1]) if swapped else tensor for (name, swapped), tensor in stacked.items()
    }


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        (
            {"img_in.weight_scale": torch.ones(4, 64)},
            r"img_in\.weight_scale: of shape \(4, 64\); what can be read is fp8",
        ),
        (
            {"img_in.weight": torch.ones(HIDDEN, 32).char(), "img_in.comfy_quant": torch.ones(9).byte()},
            r"its weights are in a format of ComfyUI's own .* Load it with 'Load Diffusion Model'",
        ),
    ],
    ids=["blocks", "int8"],
)
def test_what_has_other_scales_is_refused_and_nothing_is_written(tensors, problem, folder, tmp_path):
    save_file(values() | tensors, folder / "other.safetensors")
    with pytest.raises(CheckpointError, match=rf"^other\.safetensors: {problem}"):
        save(folder / "other.safetensors", tmp_path / "made.safetensors")
    assert not list(tmp_path.iterdir())


PARTS = {
    "a LoRA": (
        {"double_blocks.0.img_attn.qkv.lora_A.weight": torch.ones(4, HIDDEN)},
        "it is a LoRA, not a checkpoint",
    ),
    "a LoRA of diffusers": (
        {"transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight": torch.ones(4, HIDDEN)},
        "it is a LoRA, not a checkpoint",
    ),
    "a ControlNet": (
        {name: tensor for name, tensor in values().items() if not name.startswith("final_layer")}
        | {"controlnet_blocks.0.weight": torch.ones(HIDDEN, HIDDEN)},
        "it is a ControlNet, not a checkpoint",
    ),
    "a part": (
        {name: tensor for name, tensor in values().items() if name.startswith("double_blocks")},
        r"it has blocks of a Flux.1 model, but no img_in\.weight and no final_layer\.linear\.weight",
    ),
}


@pytest.mark.parametrize(("tensors", "problem"), PARTS.values(), ids=PARTS)
def test_what_has_the_blocks_of_a_flux_model_and_is_none_is_refused(tensors, problem, tmp_path):
    save_file(tensors, tmp_path / "part.safetensors")
    with pytest.raises(CheckpointError, match=rf"^part\.safetensors: {problem}"):
        sources_of_file(tmp_path / "part.safetensors", all_in_one=False)


def test_gguf_without_the_rest_of_the_model_or_as_an_all_in_one_file_is_refused(tmp_path):
    path = tmp_path / "flux.gguf"
    write_gguf(path, gguf.GGMLQuantizationType.Q8_0)
    with pytest.raises(CheckpointError, match=r"^flux\.gguf: it has no text encoders or no VAE"):
        sources_of_file(path, all_in_one=True)
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_tensor("double_blocks.0.img_attn.qkv.weight", torch.ones(8, 8).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"^flux\.gguf: it has blocks of a Flux.1 model, but no img_in"):
        sources_of_file(path, all_in_one=False)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "BF16", "F16"])
def test_gguf_is_quantised_from_what_gguf_dequantises(kind, folder, tmp_path):
    expected = write_gguf(folder / "flux.gguf", gguf.GGMLQuantizationType[kind])
    check(save(folder / "flux.gguf", tmp_path / "made.safetensors"), expected)


def test_a_folder_of_diffusers_becomes_a_file_in_the_names_of_comfyui(diffusers_model, tmp_path):
    diffusers_model.save_pretrained(tmp_path / "diffusers", max_shard_size="4MB")
    tensors = save(tmp_path / "diffusers", tmp_path / "made.safetensors")
    state = diffusers_model.state_dict()
    qkv = torch.cat([state[f"transformer_blocks.0.attn.to_{part}.weight"] for part in "qkv"])
    assert torch.equal(dequantised(tensors, "double_blocks.0.img_attn.qkv.weight"), requantised(qkv))
    scale_and_shift = state["norm_out.linear.weight"]
    swapped = torch.cat((scale_and_shift[HIDDEN:], scale_and_shift[:HIDDEN]))
    assert torch.equal(dequantised(tensors, "final_layer.adaLN_modulation.1.weight"), requantised(swapped))
    check(tensors, joined(state))


def test_layers_that_are_to_stay_dense_do(dense, tmp_path):
    tensors = save(dense, tmp_path / "made.safetensors", keep_dense=["img_in", "final_layer.*"])
    for name in ("img_in.weight", "final_layer.linear.weight", "final_layer.adaLN_modulation.1.weight"):
        assert torch.equal(tensors[name], values()[name])
    assert "txt_in.weight.absmax" in tensors


def test_a_layer_that_is_to_stay_dense_and_is_not_there_is_said(dense, tmp_path):
    with pytest.raises(CheckpointError, match=r"no layer is called 'final_layer', .* such as \w+[.\w]+, and \*"):
        save(dense, tmp_path / "made.safetensors", keep_dense=["img_in", "final_layer"])
    assert not list(tmp_path.iterdir())


def test_the_header_tells_where_the_file_is_from(dense, tmp_path):
    save(dense, tmp_path / "made.safetensors", metadata={"flux_nf4.source": dense.name})
    with safe_open(tmp_path / "made.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["flux_nf4.source"] == "dense.safetensors"
    settings = {"quant_type": "nf4", "nested": False, "blocksize": 64, "keep_dense": []}
    assert json.loads(metadata["flux_nf4.settings"]) == settings


# What is in 4 bits already


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_what_is_in_4_bits_stays_byte_for_byte(tmp_path, quant_type, nested, read_model):
    """From the file, and from the MODEL that was loaded from it."""
    path = tmp_path / "nf4.safetensors"
    recipe = Recipe(nested=nested, quant_type=quant_type, hidden=HIDDEN, unet_only=True, prefix="")
    make_checkpoint(path, recipe)
    made = tmp_path / "made.safetensors"
    patcher = comfy.model_patcher.ModelPatcher(read_model(path), torch.device("cpu"), torch.device("cpu"))
    for sources in (sources_of_file(path, all_in_one=False), sources_of_model(patcher)):
        save_quantised(made, sources, QuantSettings(quant_type, nested))
        before, after = load_file(path), load_file(made)
        assert before.keys() == after.keys()
        for name in before:
            assert before[name].dtype == after[name].dtype
            assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)), name


def test_nested_absmax_is_expanded_and_nothing_is_quantised_again(tmp_path):
    path = tmp_path / "v1.safetensors"
    make_checkpoint(path, Recipe(nested=True, hidden=HIDDEN, unet_only=True, prefix=""))
    tensors, before = save(path, tmp_path / "v2.safetensors"), load_file(path)
    for name in WEIGHTS:
        assert f"{name}.nested_absmax" not in tensors
        assert torch.equal(tensors[name], before[name])
        assert torch.equal(dequantised(tensors, name), dequantised(before, name))


@pytest.mark.parametrize(("quant_type", "nested"), [("fp4", False), ("nf4", True)])
def test_what_is_quantised_again_is_said(tmp_path, caplog, quant_type, nested):
    path = tmp_path / "before.safetensors"
    make_checkpoint(path, Recipe(quant_type=quant_type, nested=nested, hidden=HIDDEN, unet_only=True, prefix=""))
    save(path, tmp_path / "made.safetensors", keep_dense=["img_in"])
    said = [record.getMessage() for record in caplog.records if "quantised again" in record.getMessage()]
    again = len(WEIGHTS) - 1 if quant_type == "fp4" else 0
    assert len(said) == (again > 0)
    for message in said:
        assert message.startswith(f"NF4: made.safetensors: {again} weights that are in 4 bits already (fp4)")


def test_a_file_that_changed_meanwhile_is_refused(tmp_path, dense):
    path = tmp_path / "changing.safetensors"
    path.write_bytes(dense.read_bytes())
    sources = sources_of_file(path, all_in_one=False)
    save_file({"img_in.weight": torch.ones(2, 2)}, path)
    with pytest.raises(CheckpointError, match=r"changing\.safetensors: the file has changed since it was loaded"):
        save_quantised(tmp_path / "made.safetensors", sources, QuantSettings())
    assert not (tmp_path / "made.safetensors").exists()


# What ComfyUI has loaded


@pytest.fixture
def one_block_of_each(tiny_config, monkeypatch):
    """ComfyUI "detects" such a model, whose configuration this is."""
    config = comfy.model_detection.model_config_from_unet()
    config.unet_config |= {"depth": 1, "depth_single_blocks": 1}
    monkeypatch.setattr(comfy.model_detection, "model_config_from_unet", lambda *_, **__: config)
    return config


def with_lora(patcher, expected):
    """What ``expected`` is with a difference to one weight, which ``patcher`` gets."""
    qkv = "double_blocks.0.img_attn.qkv.weight"
    difference = torch.randn(SHAPES[qkv], generator=torch.Generator().manual_seed(5)) * 0.02
    assert patcher.add_patches({f"diffusion_model.{qkv}": ("diff", (difference,))}, 0.5)
    return expected | {qkv: (expected[qkv].float() + 0.5 * difference).to(expected[qkv].dtype)}


@pytest.mark.parametrize("kind", ["Q8_0", "BF16", "F16"])
def test_a_model_of_comfyui_gguf_is_quantised_with_its_lora(kind, tmp_path, one_block_of_each):
    expected = write_gguf(tmp_path / "flux.gguf", gguf.GGMLQuantizationType[kind])
    patcher = load_gguf(tmp_path / "flux.gguf")
    expected = with_lora(patcher, expected)
    save_quantised(tmp_path / "made.safetensors", sources_of_model(patcher), V2)
    check(load_file(tmp_path / "made.safetensors"), expected)


def test_a_model_in_scaled_fp8_is_quantised_with_its_lora(tmp_path, one_block_of_each, monkeypatch):
    scales = {name: torch.tensor(1 + number / 8) for number, name in enumerate(sorted(WEIGHTS))}
    stored, expected = scaled(values(), scales)
    patcher, biases_in_fp8 = load_scaled_fp8(stored, one_block_of_each, monkeypatch)
    for name in (name for name in expected if name.endswith(".bias") and biases_in_fp8):
        expected[name] = expected[name].to(torch.float8_e4m3fn).bfloat16()
    expected = with_lora(patcher, expected)
    save_quantised(tmp_path / "made.safetensors", sources_of_model(patcher), V2)
    check(load_file(tmp_path / "made.safetensors"), expected)


@pytest.mark.parametrize(
    ("name", "tensor", "problem"),
    [
        ("weight", torch.ones(HIDDEN, 64, dtype=torch.int8), r"a Parameter of torch\.int8, whose"),
        (
            "weight",
            torch.ones(HIDDEN * 32, 1, dtype=torch.uint8),
            r"a Parameter of torch\.uint8, whose",
        ),
        ("pre_quant_scale", torch.ones(64), "its layer multiplies its input by these numbers"),
    ],
    ids=["of nunchaku", "of ComfyUI_bitsandbytes_NF4", "of NVFP4 with scaled inputs"],
)
def test_a_model_in_another_form_is_refused_with_what_to_do(name, tensor, problem, one_block_of_each):
    patcher = comfy.sd.load_diffusion_model_state_dict(values())
    patcher.model.diffusion_model.img_in.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    with pytest.raises(CheckpointError, match=rf"^Flux: diffusion_model\.img_in\.{name}: {problem}.* GGUF"):
        sources_of_model(patcher)


def test_the_scale_of_inputs_is_not_saved(one_block_of_each, tmp_path):
    patcher = comfy.sd.load_diffusion_model_state_dict(values())
    patcher.model.diffusion_model.img_in.input_scale = torch.nn.Parameter(torch.ones(1))
    assert not any("scale" in source.name for source in sources_of_model(patcher) if "img_in" in source.name)


def test_models_leave_the_device_before_their_weights_are_taken(one_block_of_each, tmp_path, monkeypatch):
    patcher, calls = comfy.sd.load_diffusion_model_state_dict(values()), []
    monkeypatch.setattr(comfy.model_management, "free_memory", lambda *_: calls.append("free_memory"))
    monkeypatch.setattr(nodes_saving, "sources_of_model", lambda _: calls.append("sources_of_model") or [])
    monkeypatch.setattr(nodes_saving, "save_quantised", lambda path, *_, **__: path.touch())
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    nodes.FluxNF4QuantiseSave().save(patcher, "saved", "output", "nf4", "fp32", "")
    assert calls == ["free_memory", "sources_of_model"]


# Patches


def test_patches_are_merged_and_everything_else_is_copied(tmp_path, read_model):
    path, made = tmp_path / "nf4.safetensors", tmp_path / "made.safetensors"
    make_checkpoint(path, Recipe(hidden=HIDDEN, unet_only=True, prefix=""))
    patcher = comfy.model_patcher.ModelPatcher(read_model(path), torch.device("cpu"), torch.device("cpu"))
    qkv = "double_blocks.0.img_attn.qkv.weight"
    difference = torch.randn(SHAPES[qkv], generator=torch.Generator().manual_seed(5)) * 0.02
    assert patcher.add_patches({f"diffusion_model.{qkv}": ("diff", (difference,))}, 0.5)
    save_quantised(made, sources_of_model(patcher), QuantSettings())
    before, after = load_file(path), load_file(made)
    merged = bnb.dequantize_4bit(before[qkv], _state_in_fp32(before, qkv)) + 0.5 * difference
    assert torch.equal(dequantised(after, qkv).float(), requantised(merged).float())
    for name in before:
        if not name.startswith(qkv):
            assert torch.equal(before[name], after[name]), name


def _state_in_fp32(tensors, name):
    state = Params4bit.from_prequantized(
        tensors[name], {key: value for key, value in tensors.items() if key.startswith(f"{name}.")}, device="cpu"
    ).quant_state
    state.dtype = torch.float32
    return state


# Other tools read it


def test_diffusers_reads_the_weights(dense, tmp_path, monkeypatch):
    """Under its own names and with q, k and v apart, as whole blocks: in its model they are what they were here."""
    tensors = save(dense, tmp_path / "made.safetensors")
    split = {}
    for theirs, place in diffusers_places().items():
        if f"{place.name}.scale" in tensors:
            split[f"{theirs}.weight"] = tensors[f"{place.name}.scale"]
            continue
        name = f"{place.name}.weight"
        rows = [HIDDEN] * 3 + [4 * HIDDEN] if place.parts == 4 else [SHAPES[name][0] // place.parts] * place.parts
        for end in ("", ".absmax"):
            part = tensors[name + end].view(SHAPES[name][0], -1).split(rows)[place.part]
            split[f"{theirs}.weight{end}"] = part.reshape(-1, 1) if end == "" else part.reshape(-1)
        split[f"{theirs}.weight.quant_map"] = tensors[f"{name}.quant_map"].clone()
        state = json.loads(bytes(tensors[f"{name}.quant_state.bitsandbytes__nf4"]))
        state["shape"][0] = rows[place.part]
        raw = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        split[f"{theirs}.weight.quant_state.bitsandbytes__nf4"] = raw
        split[f"{theirs}.bias"] = tensors[f"{place.name}.bias"].split(rows)[place.part].clone()
    theirs = tmp_path / "diffusers"
    theirs.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in split.items()}, theirs / "diffusion_pytorch_model.safetensors"
    )
    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4").to_dict()
    config = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "guidance_embeds": True}
    config |= {"_class_name": "FluxTransformer2DModel", "quantization_config": quantisation}
    (theirs / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda *_, **__: None)
    model = FluxTransformer2DModel.from_pretrained(theirs, torch_dtype=torch.bfloat16, device_map={"": "cpu"})
    for name in (name for name in SHAPES if name in WEIGHTS):
        parts = [theirs for theirs, place in diffusers_places().items() if f"{place.name}.weight" == name]
        weights = [model.get_submodule(part).weight for part in parts]
        assert all(isinstance(weight, Params4bit) for weight in weights)
        got = torch.cat([bnb.dequantize_4bit(weight.data, weight.quant_state) for weight in weights])
        assert torch.equal(got, dequantised(tensors, name)), name


def diffusers_places():
    """Where each layer of diffusers is in Black Forest Labs' model with one block of each kind."""
    layout = FLUX1.layouts[1]
    folders = {ours: f"{theirs}.0." for theirs, ours in layout.lists.items()} | {"": ""}
    names = [folders[of] + part for of, layers in layout.layers.items() for parts in layers.values() for part in parts]
    places = {name: FLUX1.place(layout, f"{name}.weight") for name in names}
    return {name: replace(place, name=place.name.rpartition(".")[0]) for name, place in places.items()}


# What an early end leaves behind


@pytest.mark.parametrize("exists", [False, True])
def test_a_cancelled_saving_leaves_nothing(dense, tmp_path, exists):
    class Cancelled(BaseException):
        pass

    def cancel(_, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) == 20:
            raise Cancelled

    target = tmp_path / "made.safetensors"
    if exists:
        target.write_bytes(b"precious")
    with pytest.raises(Cancelled):
        save(dense, target, progress=cancel)
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert left == ({target.name: b"precious"} if exists else {})


def test_a_disk_that_is_full_is_said_and_leaves_nothing(dense, tmp_path, monkeypatch):
    target = tmp_path / "made.safetensors"
    target.write_bytes(b"precious")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))
    try:
        with pytest.raises(CheckpointError, match=r"made\.safetensors: writing it failed \(File too large\)\."):
            save(dense, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {target.name: b"precious"}


def test_too_little_room_is_said_before_anything_is_written(dense, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1_000_000}))
    with pytest.raises(CheckpointError, match=r"the new file takes about .* GiB; 0\.0 GiB are free") as raised:
        save(dense, tmp_path / "made.safetensors")
    assert str(tmp_path) not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_the_command_makes_the_same_file_and_replaces_none(dense, tmp_path, monkeypatch):
    target = tmp_path / "made.safetensors"
    monkeypatch.setattr(sys, "argv", ["quantise.py", str(dense), str(target), "--type", "fp4", "--nested"])
    quantise_command.main()
    check(load_file(target), values(), QuantSettings("fp4", nested=True))
    with pytest.raises(SystemExit, match="it exists already"):
        quantise_command.main()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["{folder}", "--force"], "{folder}: it is a folder"),
        (["{folder}/made.safetensors", "--device", "vulkan"], "--device vulkan: it cannot be used"),
        (["{folder}/none/made.safetensors"], "{folder}/none: there is no such folder"),
        (["{folder}/made.gguf"], "{folder}/made.gguf: it becomes a safetensors file"),
    ],
    ids=["a folder", "a device that is not there", "in no folder", "another format"],
)
def test_the_command_says_what_is_wrong_with_what_it_was_given(arguments, problem, dense, tmp_path, monkeypatch):
    given = [argument.format(folder=tmp_path) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["quantise.py", str(dense), *given])
    with pytest.raises(SystemExit, match=f"^{problem.format(folder=tmp_path)}"):
        quantise_command.main()
    assert not list(tmp_path.iterdir())


def test_the_command_never_replaces_what_it_reads(dense, tmp_path, monkeypatch):
    path = tmp_path / "dense.safetensors"
    path.write_bytes(dense.read_bytes())
    monkeypatch.setattr(sys, "argv", ["quantise.py", str(path), str(path), "--force"])
    with pytest.raises(SystemExit, match="it would replace the file that it is made of"):
        quantise_command.main()
    assert path.read_bytes() == dense.read_bytes()


def test_no_shard_of_the_source_is_replaced(diffusers_model, tmp_path):
    diffusers_model.save_pretrained(tmp_path, max_shard_size="4MB")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    shard = next(path for path in before if "00002-of" in path.name)
    with pytest.raises(CheckpointError, match="it would replace a file that it is made of"):
        save(tmp_path, shard)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("options", [[], ["--all-in-one"]])
def test_the_command_takes_layers_with_commas_and_says_what_is_left_out(options, tmp_path, monkeypatch, capsys):
    made = tmp_path / "made.safetensors"
    others = {"text_encoders.clip_l.x": torch.ones(8), "vae.decoder.x": torch.ones(8)}
    save_file({f"model.diffusion_model.{n}": v for n, v in values().items()} | others, tmp_path / "dense.safetensors")
    command = ["quantise.py", "--keep-dense", "img_in, final_layer.*", str(tmp_path / "dense.safetensors"), str(made)]
    monkeypatch.setattr(sys, "argv", [*command, *options])
    quantise_command.main()
    tensors = load_file(made)
    prefix = "model.diffusion_model." if options else ""
    assert torch.equal(tensors[f"{prefix}img_in.weight"], values()["img_in.weight"])
    assert (tensors.keys() >= others.keys()) == bool(options)
    assert ("It is the transformer only" in capsys.readouterr().out) != bool(options)


def test_the_command_says_what_a_wrong_file_is(tmp_path, monkeypatch):
    save_file({"decoder.conv_in.weight": torch.ones(2)}, tmp_path / "ae.safetensors")
    monkeypatch.setattr(
        sys, "argv", ["quantise.py", str(tmp_path / "ae.safetensors"), str(tmp_path / "made.safetensors")]
    )
    with pytest.raises(SystemExit, match=r"^ae\.safetensors: it is a VAE, not a transformer of Chroma, Flux 2, Flux"):
        quantise_command.main()
    assert not (tmp_path / "made.safetensors").exists()


def test_the_command_runs_by_itself():
    """With nothing but its own folder on the path."""
    command = [sys.executable, environment.ROOT / "commands" / "quantise.py", "--help"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100, cwd="/")
    assert "--keep-dense" in shown.stdout
