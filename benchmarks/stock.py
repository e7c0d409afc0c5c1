"""What a user of ComfyUI has without this package: its own loader with its own offloading, and GGUF."""

import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import torch
from cases import Case
from comfy_model import ComfyModel, at_work
from family import Unavailable
from inside_comfyui import has_dynamic_vram
from weights import Files


class Stock:
    """A patcher that ComfyUI keeps in VRAM as far as it has room, or not at all."""

    def __init__(self, patcher: Any, *, is_gguf: bool = False) -> None:
        self._patcher = patcher
        self._is_gguf = is_gguf

    @contextmanager
    def at_work(self, setting: str, case: Case) -> Iterator[ComfyModel]:
        if setting == "offloaded" and has_dynamic_vram():
            raise Unavailable("with dynamic VRAM ComfyUI has no such setting")
        if self._is_gguf and case.bus_gbps:
            raise Unavailable("its tensors' class does not work while copies are padded")
        management = comfy.model_management
        state = management.vram_state
        if setting == "offloaded":
            management.vram_state = management.VRAMState.NO_VRAM  # --novram
        try:
            with at_work(self._patcher, case) as model:
                yield model
        finally:
            management.vram_state = state


def dense(files: Files, dtype: torch.dtype) -> Stock:
    """ "Load Diffusion Model" on a file in ``dtype``."""
    return Stock(comfy.sd.load_diffusion_model(str(files.dense(dtype)), model_options={"dtype": dtype}))


def gguf(files: Files, pack: Path | None) -> Stock:
    """ "Unet Loader (GGUF)" of the user's copy of city96/ComfyUI-GGUF.

    Raises:
        Unavailable: there is no copy, or a package that it needs is missing.
    """
    if pack is None:
        raise Unavailable("needs a copy of city96/ComfyUI-GGUF: --gguf-pack FOLDER")
    if importlib.util.find_spec("gguf") is None:
        raise Unavailable("needs the Python package gguf")
    path = files.gguf()
    import folder_paths

    folder_paths.add_model_folder_path("diffusion_models", str(path.parent))
    loader = _import_folder(pack).UnetLoaderGGUF()
    return Stock(loader.load_unet(path.name)[0], is_gguf=True)


def _import_folder(pack: Path) -> Any:
    """The module ``nodes`` of a node pack, without the rest of ComfyUI's server."""
    sys.modules.setdefault("nodes", types.ModuleType("nodes"))  # it wants ComfyUI's for its CLIP loaders only
    package = types.ModuleType("gguf_pack")
    package.__path__ = [str(pack)]
    sys.modules["gguf_pack"] = package
    return importlib.import_module("gguf_pack.nodes")
