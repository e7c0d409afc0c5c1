"""Packed weights that stay in their file: the system reads them when they are used, and drops them if RAM is short."""

import mmap
import warnings
from pathlib import Path

import comfy.model_base
import torch

from ..checkpoint.catalogue import Catalogue
from ..checkpoint.errors import CheckpointError
from ..linear.linear4bit import Linear4bit
from .transformers import block_groups, model_names

Mapped = dict[torch.nn.Module, dict[str, torch.Tensor]]
"""Tensors by their module, then by the name of the buffer."""


def map_packed(model: comfy.model_base.BaseModel, catalogue: Catalogue) -> Mapped:
    """The packed bytes of the blocks' layers as views (uint8, flat) of the files, which must not change meanwhile.

    A layer that the file has in several pieces, as diffusers' q, k and v, is left out.

    Raises:
        CheckpointError: the system refuses to map a file.
    """
    files: dict[Path, torch.Tensor] = {}
    mapped: Mapped = {}
    in_blocks = {module for group in block_groups(model).values() for block in group for module in block.modules()}
    modules = dict(model.diffusion_model.named_modules())
    for name, source in model_names(model, catalogue).items():
        linear, tensor = modules.get(name.removesuffix(".weight")), catalogue.transformer[source]
        if not name.endswith(".weight") or linear not in in_blocks or not isinstance(linear, Linear4bit):
            continue
        if len(tensor.parts) > 1 or tensor.halves_swapped:
            continue
        packed = tensor.weights4bit[0].packed
        if packed.path not in files:
            files[packed.path] = _map(packed.path)
        mapped[linear] = {"packed_0": files[packed.path][packed.offset : packed.offset + packed.nbytes]}
    return mapped


def _map(path: Path) -> torch.Tensor:
    # Read-only: a private map may be written, so a system without that much memory refuses it.
    try:
        with path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError(path, f"it cannot be mapped into memory ({error}). Close other programs.") from error
    with torch.inference_mode(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # and nobody writes to it
        return torch.frombuffer(memory, dtype=torch.uint8)
