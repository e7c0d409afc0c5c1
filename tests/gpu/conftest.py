"""Tests on a GPU: ComfyUI with this package on it, and models that are made there in a moment.

    COMFYUI_PATH=~/ComfyUI python -m pytest tests/gpu

They need a run of their own, because ComfyUI picks its device once a process and all other tests want the CPU. They
need PyTorch, bitsandbytes and what ComfyUI needs, but neither a network nor any other package of the test environment.
"""

from dataclasses import replace
from pathlib import Path

import comfy.model_detection
import comfy.model_management
import pytest
import torch
from gpu_models import DEVICE, TINY, WIDE, Model
from make_checkpoint import make_checkpoint
from tiny_flux import HIDDEN, detection_of

from flux_nf4.checkpoints import load_transformer
from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    if DEVICE.type != "cpu":
        return
    there = torch.cuda.is_available()
    reason = "in a run of their own only: pytest tests/gpu" if there else "PyTorch finds no GPU on this machine"
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _nothing_is_loaded():
    """Each test begins and ends with nothing of any model on the device."""
    yield
    comfy.model_management.unload_all_models()
    comfy.model_management.current_loaded_models.clear()


@pytest.fixture(scope="session")
def load_recipe(tmp_path_factory):
    """A function: the model of a recipe, made on the device and loaded as the nodes do."""
    folder = tmp_path_factory.mktemp("checkpoints")
    has_computed = False

    def load(recipe, latent_side=8, staging_bytes=600_000):
        path = folder / f"{len(list(folder.iterdir()))}.safetensors"
        make_checkpoint(path, recipe)
        with pytest.MonkeyPatch.context() as patch:
            if recipe.hidden == HIDDEN:
                config = detection_of(recipe.double_blocks, recipe.single_blocks)
                patch.setattr(comfy.model_detection, "model_config_from_unet", config)
            model = Model(load_transformer(read_catalogue(path)), recipe, latent_side, staging_bytes)
        nonlocal has_computed
        if not has_computed:  # in ComfyUI 0.33 the first forward of a process rounds otherwise, with any modules
            model.sample(model.resident())
            has_computed = True
        return model

    return load


@pytest.fixture(scope="session")
def tiny(load_recipe):
    """Hidden size 256: little but launches, so that the host runs far ahead of the device."""
    return load_recipe(TINY)


@pytest.fixture(scope="session")
def other_tiny(load_recipe):
    """As `tiny`, with other weights."""
    return load_recipe(replace(TINY, seed=1))


@pytest.fixture(scope="session")
def wide(load_recipe):
    """Hidden size 3072, as Flux has: kernels and copies of the real size, at 1024x1024."""
    return load_recipe(WIDE, latent_side=128, staging_bytes=160 << 20)


@pytest.fixture(params=["tiny", "wide"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def expected(model):
    """The latents of `model` with all its blocks on the device, where nothing is streamed."""
    patcher = model.resident()
    latents = model.sample(patcher)
    assert patcher.report().streamed == ()
    comfy.model_management.unload_all_models()
    return latents
