"""Finds the tensors of a model's blocks that the files have just as the model uses them."""

from collections.abc import Iterator, Mapping

import comfy.model_base
import torch

from ..checkpoint.catalogue import Catalogue
from ..checkpoint.header import TensorEntry
from ..checkpoint.read_parts import torch_dtype
from ..checkpoint.tensors import TransformerTensor
from ..linear.linear4bit import Linear4bit
from .transformers import block_groups, model_names

InFile = Mapping[torch.nn.Module, Mapping[str, TensorEntry]]
"""Where the bytes of a tensor are, by its module, then by its name there."""


def bytes_of(in_file: InFile) -> int:
    return sum(entry.nbytes for named in in_file.values() for entry in named.values())


def tensors_in_file(model: comfy.model_base.BaseModel, catalogue: Catalogue) -> InFile:
    """The weights of layers in the blocks of ``model`` that can be used from the file's memory, without reading them.

    A tensor cannot if the model has it otherwise than the file: q, k and v in one tensor, swapped halves, expanded
    absmax, another dtype. Nor can it if its first byte is not aligned for its dtype.
    """
    in_blocks = {module for group in block_groups(model).values() for block in group for module in block.modules()}
    modules = dict(model.diffusion_model.named_modules())
    in_file: dict[torch.nn.Module, dict[str, TensorEntry]] = {}
    for name, source in model_names(model, catalogue).items():
        path, _, kind = name.rpartition(".")
        module = modules.get(path)
        if kind == "weight" and module in in_blocks and isinstance(module, torch.nn.Linear):
            in_file[module] = parts_in_file(module, catalogue.transformer[source])
    return {module: named for module, named in in_file.items() if named}


def parts_in_file(linear: torch.nn.Linear, tensor: TransformerTensor) -> dict[str, TensorEntry]:
    """As `tensors_in_file`, of one layer whose weight is ``tensor``."""
    return {name: entry for name, (entry, width) in _of_linear(linear, tensor) if entry.offset % width == 0}


def _of_linear(linear: torch.nn.Linear, tensor: TransformerTensor) -> Iterator[tuple[str, tuple[TensorEntry, int]]]:
    """The tensors of ``linear`` that are a part of ``tensor`` unchanged: name, the part, and the bytes of one value."""
    if tensor.halves_swapped:
        return
    if not isinstance(linear, Linear4bit):
        (*others, part) = tensor.parts
        if not others and isinstance(part, TensorEntry) and torch_dtype(part) == linear.weight.dtype:
            yield "weight", (part, linear.weight.element_size())
    elif len(linear.parts) == len(tensor.parts):
        for i, part in enumerate(tensor.parts):
            if isinstance(part, TensorEntry):
                if torch_dtype(part) == linear.dtype:
                    yield f"dense_{i}", (part, linear.dtype.itemsize)
                continue
            yield f"packed_{i}", (part.packed, 1)
            if not part.state.nested:
                yield f"absmax_{i}", (part.absmax, 4)
            elif tensor.nested:
                yield f"absmax_{i}", (part.absmax, 1)
