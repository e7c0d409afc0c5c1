"""The node class, in process."""

import os
import sys
import types

import comfy.cli_args
import folder_paths
import pytest
import torch
from make_checkpoint import Recipe, make_checkpoint, make_twin
from safetensors.torch import load_file

from flux_nf4 import nodes, nodes_old, nodes_shared
from flux_nf4.checkpoints import load_transformer
from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue
from flux_nf4.nf4_loader.checkpoint.errors import CheckpointError
from flux_nf4.nf4_loader.checkpoint.quant_state import QuantState
from flux_nf4.nf4_loader.linear import kernels
from flux_nf4.nf4_loader.linear.by_table import dequantise as dequantise_by_table

OLD_NODE = "MZ_Flux1CheckpointLoaderNF4_cpuDynOffload"


def test_a_missing_file_is_an_error_that_names_the_folder():
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors: there is no such file in the checkpoints folder"):
        nodes.NODE_CLASS_MAPPINGS[OLD_NODE]().load_checkpoint("gone.safetensors")
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors: there is no such file in the text_encoders"):
        nodes.NODE_CLASS_MAPPINGS["FluxNF4DualCLIPLoader"]().load_clip("gone.safetensors", "gone.safetensors")
    assert folder_paths.get_folder_paths("checkpoints")


@pytest.mark.parametrize("prefix", ["../escaped", "a/../../escaped", "/escaped"])
def test_a_name_to_save_that_leaves_the_folder_is_refused_before_anything_is_made(prefix, tmp_path, monkeypatch):
    output = tmp_path / "output"
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(output))
    with pytest.raises(CheckpointError, match=r"^output: filename_prefix .*escaped leads out of this folder"):
        nodes.FluxNF4QuantiseSave().save(None, prefix, "output", "nf4", "fp32", "")
    assert list(tmp_path.iterdir()) == []


def test_the_blocks_of_every_model_can_be_counted_and_old_nodes_count_as_ever():
    """FLUX.2 dev has 48 single blocks, HunyuanVideo 1.5 has 54 double blocks."""
    for name, node in nodes.NODE_CLASS_MAPPINGS.items():
        types = node.INPUT_TYPES()
        inputs = {**types["required"], **types.get("optional", {})}
        counts = {given: options[1] for given, options in inputs.items() if "_blocks" in given}
        limits = {given: (of["min"], of["max"], of["default"]) for given, of in counts.items()}
        if name.startswith("MZ_"):
            assert limits == {"double_blocks_cuda_size": (0, 16, 7), "single_blocks_cuda_size": (0, 37, 7)}
        for given, (least, most, default) in limits.items():
            assert name.startswith("MZ_") or (least, default) == (-1, -1)
            assert name.startswith("MZ_") or most >= 54
            assert name.startswith("MZ_") == ("Flux.1" in counts[given]["tooltip"])
    assert nodes_shared.residency_of(single_blocks=48).counts == (("single", 48),)


@pytest.fixture
def dense_file(tmp_path, monkeypatch):
    """Reads of a file of ComfyUI's own loader, whose model is streamed as it is."""
    reads = []
    (tmp_path / "dense.safetensors").touch()
    paths = {"checkpoints": tmp_path, "diffusion_models": tmp_path}
    monkeypatch.setattr(folder_paths, "get_full_path", lambda folder, name: str(paths[folder] / name))
    monkeypatch.setattr(nodes_shared, "stream_model", lambda model, *_: model)

    def load(_, **inputs):
        reads.append(inputs)
        return [f"{part} {len(reads)}" for part in ("model", "clip", "vae")]

    monkeypatch.setattr(nodes_old.comfy_nodes.CheckpointLoaderSimple, "load_checkpoint", load)
    monkeypatch.setattr(nodes_old.comfy_nodes.UNETLoader, "load_unet", lambda _, **inputs: load(_, **inputs)[:1])
    return tmp_path / "dense.safetensors", reads


def load_checkpoint(node, name, count):
    return node.load_checkpoint(name, double_blocks_cuda_size=count, single_blocks_cuda_size=count)


def load_unet(node, name, count):
    counts = {"double_blocks_cuda_size": count, "single_blocks_cuda_size": count}
    return node.load_unet(unet_name=name, weight_dtype="default", **counts)


@pytest.mark.parametrize(
    ("node", "load"), [(nodes_old.OldCheckpointLoader, load_checkpoint), (nodes_old.OldUNETLoader, load_unet)]
)
def test_other_counts_of_an_old_node_read_the_dense_file_no_more(node, load, dense_file):
    file, reads = dense_file
    node = node()
    first = load(node, file.name, 7)
    assert load(node, file.name, 3) == first
    assert len(reads) == 1
    os.utime(file, ns=(1, 1))
    assert load(node, file.name, 3) != first
    assert len(reads) == 2


@pytest.mark.parametrize(
    ("node", "load", "right"),
    [
        (nodes_old.OldCheckpointLoader, load_checkpoint, r"'Load Flux NF4 \(streamed\)'"),
        (nodes_old.OldUNETLoader, load_unet, r"'Load Flux NF4 UNet \(streamed\)'"),
    ],
)
def test_a_file_in_4_bits_is_sent_to_the_node_that_loads_it(node, load, right, dense_file):
    file, reads = dense_file
    make_checkpoint(file, Recipe(hidden=256, unet_only=True))
    with pytest.raises(CheckpointError, match=f"its weights are in 4 bits of bitsandbytes. Load it with {right}"):
        load(node(), file.name, 7)
    assert not reads


@pytest.mark.parametrize("gives_up", ["by callback", "by option"])
def test_nothing_is_kept_where_comfyui_gives_outputs_up(gives_up, dense_file, monkeypatch):
    file, reads = dense_file
    memory_management = types.ModuleType("comfy.memory_management")
    monkeypatch.setitem(sys.modules, "comfy.memory_management", memory_management)
    if gives_up == "by callback":
        memory_management.extra_ram_release_callback = lambda *_: 0
    monkeypatch.setattr(comfy.cli_args.args, "cache_ram", 4.0 if gives_up == "by option" else [], raising=False)
    node = nodes_old.OldCheckpointLoader()
    for _ in range(2):
        load_checkpoint(node, file.name, 7)
    assert len(reads) == 2


def test_kernels_are_tried_while_the_file_is_read(tiny_file, tiny_config, monkeypatch):
    """The first forward would else have to wait for bitsandbytes to be imported."""
    problem, tried = kernels._bitsandbytes_problem, []
    monkeypatch.setattr(kernels, "_bitsandbytes_problem", lambda device: tried.append(device) or problem(device))
    kernels._dequantise_for.cache_clear()
    patcher = load_transformer(read_catalogue(tiny_file))
    assert tried == [patcher.load_device]


@pytest.mark.parametrize("nested", [False, True])
def test_the_dense_twin_has_the_values_of_the_packed_file(nested, tmp_path):
    """The maker's two files against each other, by the table: the oracle stands on this."""
    recipe = Recipe(hidden=256, blocksize=128, nested=nested, unet_only=True)
    make_checkpoint(tmp_path / "nf4.safetensors", recipe)
    make_twin(tmp_path / "twin.safetensors", recipe, torch.float32)
    packed, twin = load_file(tmp_path / "nf4.safetensors"), load_file(tmp_path / "twin.safetensors")
    checked = 0
    for name, weight in twin.items():
        if f"{name}.absmax" not in packed:
            assert torch.equal(weight, packed[name].float())
            continue
        absmax = packed[f"{name}.absmax"]
        if nested:
            scales = packed[f"{name}.nested_absmax"].repeat_interleave(256)[: absmax.numel()]
            state = bytes(packed[f"{name}.quant_state.bitsandbytes__nf4"].tolist()).decode()
            offset = float(state.split('"nested_offset": ')[1].rstrip("}"))
            absmax = packed[f"{name}.nested_quant_map"][absmax.long()] * scales + offset
        how = QuantState("nf4", 128, tuple(weight.shape))
        dense = dequantise_by_table(packed[name].view(-1), absmax, how, torch.float32)
        assert torch.equal(weight, dense)
        checked += 1
    assert checked > 20
