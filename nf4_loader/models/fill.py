"""Reads the transformer's bytes from its files into the host memory that a model is bound to."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

import comfy.model_base
import torch

from ..checkpoint.catalogue import Catalogue
from ..checkpoint.header import TensorEntry
from ..checkpoint.read_parts import DenseMemory, PackedMemory, memory_of, read_parts, swap_halves
from ..checkpoint.tensors import TransformerTensor
from ..linear.linear4bit import Linear4bit
from .transformers import model_names

There = Mapping[torch.nn.Module, Collection[str]]
"""Names of tensors that already have their values, by module."""


def fill(
    model: comfy.model_base.BaseModel,
    catalogue: Catalogue,
    progress: Callable[[int], None],
    there: There = MappingProxyType({}),
) -> None:
    """Read the transformer's tensors from the files into the host memory that ``model`` is bound to.

    What is ``there`` is not read. ``progress`` receives byte counts. They sum to ``catalogue.transformer_bytes`` minus
    what is there and minus tensors that the model does not use. The model remembers the catalogue as
    ``model.nf4_catalogue``.

    Raises:
        CheckpointError: a file ended early, could not be read, or has another code table than its type says.
    """
    with torch.inference_mode(False), torch.no_grad():
        read_parts(list(_destinations(model, catalogue, there)), progress)
        _swap_halves(model, catalogue, there)
    model.nf4_catalogue = catalogue


def _destinations(
    model: comfy.model_base.BaseModel, catalogue: Catalogue, there: There
) -> Iterator[PackedMemory | DenseMemory]:
    """Every part of every tensor that the model has, with the memory that it goes to."""
    modules = dict(model.diffusion_model.named_modules())
    for name, source in model_names(model, catalogue).items():
        tensor = catalogue.transformer[source]
        path, _, kind = name.rpartition(".")
        module = modules.get(path)
        have = there.get(module, ()) if module is not None else ()
        if isinstance(module, Linear4bit) and kind == "weight":
            yield from parts_to_read(module, tensor, have)
        elif module is not None and kind not in have:
            parameter = module._parameters.get(kind)
            if parameter is not None:  # else not of this model: `build_transformer` has logged it
                yield from _of_parameter(parameter, tensor)


def parts_to_read(
    linear: Linear4bit, tensor: TransformerTensor, have: Collection[str]
) -> Iterator[PackedMemory | DenseMemory]:
    """Each part of ``tensor``, which is the weight of ``linear``, with the memory there that it goes to. What the layer
    has already, by the names of its buffers, is not wanted."""
    for i, part in enumerate(memory_of(tensor, linear.tensors)):
        if isinstance(part, DenseMemory):
            if f"dense_{i}" not in have:
                yield part
            continue
        of_layer = 0 if tensor.fused is not None else i
        packed, absmax = (f"{name}_{of_layer}" in have for name in ("packed", "absmax"))
        yield replace(part, packed=None if packed else part.packed, absmax=None if absmax else part.absmax)


def _of_parameter(parameter: torch.Tensor, tensor: TransformerTensor) -> Iterator[DenseMemory]:
    rows = parameter.split([part.shape[0] for part in tensor.parts]) if len(tensor.parts) > 1 else (parameter,)
    for part, values in zip(tensor.parts, rows, strict=True):
        assert isinstance(part, TensorEntry)  # what is packed has become a `Linear4bit`
        yield DenseMemory(part, values)


def _swap_halves(model: comfy.model_base.BaseModel, catalogue: Catalogue, there: There) -> None:
    """Swap the halves of tensors that have them in the other order in the file."""
    swapped = {name for name, tensor in catalogue.transformer.items() if tensor.halves_swapped}
    for name in (name for name, source in model_names(model, catalogue).items() if source in swapped):
        path, _, kind = name.rpartition(".")
        module = model.diffusion_model.get_submodule(path)
        if module not in there:
            for memory in _memory(module, kind):
                swap_halves(memory)


def _memory(module: torch.nn.Module, kind: str) -> Iterable[torch.Tensor]:
    if isinstance(module, Linear4bit) and kind == "weight":
        (whole,) = module.tensors
        return whole.values()
    return (module.get_parameter(kind),)
