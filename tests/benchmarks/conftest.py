"""A tiny model for the benchmarks, in this process."""

import comfy.model_detection
import comfy.model_management
import pytest
import torch
from tiny_flux import detection_of
from weights import TINY_BLOCKS, Files


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@pytest.fixture
def tiny_files(tiny_folder, monkeypatch):
    """`Files` of the tiny model, which ComfyUI takes for as long as the test runs."""
    monkeypatch.setattr(comfy.model_detection, "model_config_from_unet", detection_of(*TINY_BLOCKS))
    with torch.inference_mode():
        yield Files(tiny_folder, is_tiny=True)
    comfy.model_management.unload_all_models()
