"""Saving: what is made of each kind of model, what stays byte for byte, and what a crash leaves behind."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace

import checkpoint_layout as layout
import comfy.model_patcher
import environment
import gguf
import pytest
import quantise as quantise_command
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Params4bit
from diffusers import BitsAndBytesConfig, FluxTransformer2DModel
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer
from make_checkpoint import Recipe, make_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flux_nf4.nf4_loader import layouts
from flux_nf4.nf4_loader.errors import CheckpointError
from flux_nf4.nf4_loader.model_sources import sources_of_model
from flux_nf4.nf4_loader.quantise import QuantSettings
from flux_nf4.nf4_loader.save import save_quantised
from flux_nf4.nf4_loader.sources import sources_of_file

V2 = QuantSettings()
HIDDEN = 256
SHAPES = layout.flux(1, 1, guidance=True, hidden=HIDDEN)
WEIGHTS = {name for name, shape in SHAPES.items() if len(shape) == 2}


def values(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).mul_(0.05).to(dtype) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def dense(folder):
    path = folder / "dense.safetensors"
    save_file(values(), path)
    return path


def save(source, path, settings=V2, **options):
    save_quantised(path, sources_of_file(source, all_in_one=False), settings, **options)
    return load_file(path)


def dequantised(tensors, name):
    """The weight as bitsandbytes' own loader and kernel give it."""
    state = {key: value for key, value in tensors.items() if key.startswith(f"{name}.")}
    read = Params4bit.from_prequantized(tensors[name], state, device="cpu")
    return bnb.dequantize_4bit(read.data, read.quant_state)


def requantised(weight, settings=V2):
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type=settings.quant_type, compress_statistics=settings.nested
    )
    return bnb.dequantize_4bit(packed, state)


def check(tensors, expected, settings=V2):
    """The file holds ``expected``, its weights as bitsandbytes quantises them, and nothing else."""
    assert {name.split(".weight.")[0].removesuffix(".weight") for name in tensors if ".weight" in name} == {
        name.removesuffix(".weight") for name in WEIGHTS
    }
    for name, value in expected.items():
        if name in WEIGHTS:
            assert torch.equal(dequantised(tensors, name), requantised(value, settings)), name
        else:
            assert torch.equal(tensors[name], value), name


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


def test_scaled_fp8_is_quantised_from_its_scaled_values(folder, tmp_path):
    fp8 = {n: v.to(torch.float8_e4m3fn) if n in WEIGHTS else v for n, v in values().items()}
    scaled = dict(fp8, scaled_fp8=torch.zeros(0, dtype=torch.float8_e4m3fn))
    scaled |= {n.removesuffix("weight") + "scale_weight": torch.tensor(3.5) for n in WEIGHTS}
    save_file(scaled, folder / "scaled.safetensors")
    expected = {n: (v.float() * 3.5).bfloat16() if n in WEIGHTS else v for n, v in fp8.items()}
    check(save(folder / "scaled.safetensors", tmp_path / "made.safetensors"), expected)


def test_gguf_is_quantised_from_what_gguf_dequantises(folder, tmp_path):
    kind = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(folder / "flux.gguf", "flux")
    expected = {}
    for name, value in values(torch.float32).items():
        if name not in WEIGHTS:
            writer.add_tensor(name, value.numpy())
            expected[name] = value
            continue
        raw = gguf.quants.quantize(value.numpy(), kind)
        writer.add_tensor(name, raw, raw_dtype=kind)
        expected[name] = torch.from_numpy(gguf.quants.dequantize(raw, kind)).bfloat16()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check(save(folder / "flux.gguf", tmp_path / "made.safetensors"), expected)


def test_a_folder_of_diffusers_becomes_a_file_in_the_names_of_comfyui(tmp_path, monkeypatch):
    model = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=128, num_attention_heads=2, guidance_embeds=True
    ).bfloat16()
    model.save_pretrained(tmp_path / "diffusers", max_shard_size="4MB")
    tensors = save(tmp_path / "diffusers", tmp_path / "made.safetensors")
    state = model.state_dict()
    qkv = torch.cat([state[f"transformer_blocks.0.attn.to_{part}.weight"] for part in "qkv"])
    assert torch.equal(dequantised(tensors, "double_blocks.0.img_attn.qkv.weight"), requantised(qkv))
    scale_and_shift = state["norm_out.linear.weight"]
    swapped = torch.cat((scale_and_shift[HIDDEN:], scale_and_shift[:HIDDEN]))
    assert torch.equal(dequantised(tensors, "final_layer.adaLN_modulation.1.weight"), requantised(swapped))
    assert {name for name in tensors if ".weight." not in name} == SHAPES.keys()


def test_layers_that_are_to_stay_dense_do(dense, tmp_path):
    tensors = save(dense, tmp_path / "made.safetensors", keep_dense=["img_in", "final_layer.*"])
    for name in ("img_in.weight", "final_layer.linear.weight", "final_layer.adaLN_modulation.1.weight"):
        assert torch.equal(tensors[name], values()[name])
    assert "txt_in.weight.absmax" in tensors


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


def test_a_file_that_changed_meanwhile_is_refused(tmp_path, dense):
    path = tmp_path / "changing.safetensors"
    path.write_bytes(dense.read_bytes())
    sources = sources_of_file(path, all_in_one=False)
    save_file({"img_in.weight": torch.ones(2, 2)}, path)
    with pytest.raises(CheckpointError, match=r"changing\.safetensors: the file has changed since it was loaded"):
        save_quantised(tmp_path / "made.safetensors", sources, QuantSettings())
    assert not (tmp_path / "made.safetensors").exists()


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
    blocks = {f"{kind}.0.{layer}": kind for kind, layers in layouts._PLACES.items() for layer in layers}
    names = [*layouts._PLACES_OF_REST, *blocks]
    places = {name: layouts.place("diffusers", f"{name}.weight") for name in names}
    return {name: replace(place, name=place.name.rpartition(".")[0]) for name, place in places.items()}


# What a crash leaves behind


def in_child(action):
    """Run ``action`` in a fork; returns its process id."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    return child


def test_whoever_is_killed_leaves_the_target_absent_or_whole(dense, tmp_path):
    target = tmp_path / "made.safetensors"
    sources = sources_of_file(dense, all_in_one=False)
    started = time.monotonic()
    save_quantised(target, sources, QuantSettings())
    took = time.monotonic() - started
    whole = target.read_bytes()
    target.unlink()
    absent = 0
    for i in range(50):
        child = in_child(lambda: save_quantised(target, sources, QuantSettings()))
        time.sleep(random.Random(i).random() * took * 1.2)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if target.exists():
            assert target.read_bytes() == whole
            target.unlink()
        else:
            absent += 1
    assert absent > 5
    save_quantised(target, sources, QuantSettings())
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


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
        with pytest.raises(CheckpointError, match=r"made\.safetensors: writing it failed \(.*File too large"):
            save(dense, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {target.name: b"precious"}


def test_too_little_room_is_said_before_anything_is_written(dense, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1_000_000}))
    with pytest.raises(CheckpointError, match=r"the new file takes about .* GiB; 0\.0 GiB are free"):
        save(dense, tmp_path / "made.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_command_makes_the_same_file_and_replaces_none(dense, tmp_path, monkeypatch):
    target = tmp_path / "made.safetensors"
    monkeypatch.setattr(sys, "argv", ["quantise.py", str(dense), str(target), "--type", "fp4", "--nested"])
    quantise_command.main()
    check(load_file(target), values(), QuantSettings("fp4", nested=True))
    with pytest.raises(SystemExit, match="it exists already"):
        quantise_command.main()


def test_the_command_says_what_a_wrong_file_is(tmp_path, monkeypatch):
    save_file({"decoder.conv_in.weight": torch.ones(2)}, tmp_path / "ae.safetensors")
    monkeypatch.setattr(
        sys, "argv", ["quantise.py", str(tmp_path / "ae.safetensors"), str(tmp_path / "made.safetensors")]
    )
    with pytest.raises(SystemExit, match=r"^ae\.safetensors: it is a VAE, not a Flux transformer"):
        quantise_command.main()
    assert not (tmp_path / "made.safetensors").exists()


def test_the_command_runs_by_itself():
    """With nothing but its own folder on the path."""
    command = [sys.executable, environment.ROOT / "commands" / "quantise.py", "--help"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100, cwd="/")
    assert "--keep-dense" in shown.stdout
