"""Where the RAM does not hold a model, its packed weights stay in the file."""

import gc
import logging
import mmap
from contextlib import nullcontext
from dataclasses import replace

import comfy.model_management
import psutil
import pytest
import torch
from make_checkpoint import Recipe, make_checkpoint
from there_and_back import Copied, move
from tiny_flux import HIDDEN

from flux_nf4.checkpoints import load_transformer, streamed
from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue
from flux_nf4.nf4_loader.checkpoint.errors import CheckpointError
from flux_nf4.offload.host_memory import keep_host_memory
from flux_nf4.offload.plan import Residency

RECIPE = Recipe(double_blocks=8, single_blocks=10, hidden=HIDDEN, unet_only=True)


@pytest.fixture(scope="module", params=[False, True], ids=["v2", "v1"])
def file(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("mapped") / "tiny.safetensors"
    make_checkpoint(path, replace(RECIPE, nested=request.param))
    return path


@pytest.fixture
def free_ram(monkeypatch):
    """A function: has ComfyUI see this much free RAM (bytes), and no swap."""
    real = comfy.model_management.get_free_memory

    def set_to(nbytes):
        def get_free_memory(dev=None, torch_free_too=False):
            return real(dev, torch_free_too) if torch_free_too or dev != torch.device("cpu") else nbytes

        monkeypatch.setattr(comfy.model_management, "get_free_memory", get_free_memory)

    monkeypatch.setattr(psutil, "swap_memory", lambda: type("Swap", (), {"free": 0}))
    return set_to


def load(file, double=0, single=0):
    gc.collect()
    model = load_transformer(read_catalogue(file))
    return streamed(model, Residency((("double", double), ("single", single))), node_id=None)


@pytest.mark.parametrize("counts", [(0, 0), (3, 4), (19, 38)])
def test_the_picture_is_the_same(file, counts, tiny_config, copies, free_ram, sample, caplog):
    expected = sample(load(file, *counts))
    comfy.model_management.unload_all_models()
    free_ram(read_catalogue(file).transformer_ram // 2)
    with caplog.at_level(logging.WARNING):
        patcher = load(file, *counts)
    (said,) = [record.message for record in caplog.records if "packed weights stay in the file" in record.message]
    assert "tiny.safetensors takes" in said
    streamer = patcher.model.streaming.streamer
    assert streamer.host_bytes < 0.5 * read_catalogue(file).transformer_ram
    assert not streamer.all_pinned
    assert torch.equal(sample(patcher), expected)


def test_on_the_cpu_it_computes_from_the_file(file, tiny_config, free_ram, sample):
    expected = sample(load(file))
    comfy.model_management.unload_all_models()
    free_ram(read_catalogue(file).transformer_ram // 2)
    patcher = load(file)
    assert patcher.model.streaming.streamer.host_bytes < 0.5 * read_catalogue(file).transformer_ram
    assert torch.equal(sample(patcher), expected)


def test_a_patch_is_that_of_a_model_in_ram(file, tiny_config, copies, free_ram, sample):
    key = "diffusion_model.double_blocks.1.img_mlp.0.weight"

    def patched():
        patcher = load(file)
        patcher.add_patches({key: ("diff", (torch.full((1024, 256), 0.01),))})
        return patcher

    expected = sample(patched())
    comfy.model_management.unload_all_models()
    free_ram(read_catalogue(file).transformer_ram // 2)
    assert torch.equal(sample(patched()), expected)


@pytest.mark.parametrize("is_short", [False, True])
def test_ram_kept_for_what_is_on_the_device_is_given_back_where_it_is_short(file, is_short, tiny_config, free_ram):
    encoder = torch.nn.Linear(2, 2)
    keep_host_memory(encoder)
    move(encoder, "meta")
    free_ram(read_catalogue(file).transformer_ram // 2 if is_short else 1 << 40)
    load(file)
    with pytest.raises(Copied) if is_short else nullcontext():
        move(encoder, "cpu")


def test_too_little_for_the_rest_is_an_error(file, tiny_config, free_ram):
    free_ram(1 << 20)
    with pytest.raises(CheckpointError, match=r"GiB of RAM; 0\.00 GiB are free"):
        load(file)


def test_a_system_that_refuses_the_map_is_told(file, tiny_config, free_ram, monkeypatch):
    def refuse(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    free_ram(read_catalogue(file).transformer_ram // 2)
    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be mapped into memory \(.*Cannot allocate memory\)"):
        load(file)
