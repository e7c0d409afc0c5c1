"""Reads the transformer's bytes from its files into the host memory that a model is bound to."""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace

import comfy.model_base
import torch

from ..checkpoint.catalogue import Catalogue, TransformerTensor
from ..checkpoint.header import TensorEntry
from ..checkpoint.read_parts import DenseMemory, PackedMemory, memory_of, read_parts, swap_halves
from ..linear.linear4bit import Linear4bit
from .transformers import model_names


def fill(
    model: comfy.model_base.BaseModel,
    catalogue: Catalogue,
    progress: Callable[[int], None],
    mapped: Collection[torch.nn.Module] = (),
) -> None:
    """Read the transformer's tensors from the files into the host memory that ``model`` is bound to.

    Of the ``mapped`` layers (`map_packed`) only absmax and its tables are read. ``progress`` receives byte counts. They
    sum to ``catalogue.transformer_bytes`` minus mapped bytes and minus tensors that the model does not use. The model
    remembers the catalogue as ``model.nf4_catalogue``.

    Raises:
        CheckpointError: a file ended early, could not be read, or has another code table than its type says.
    """
    with torch.inference_mode(False), torch.no_grad():
        read_parts(list(_destinations(model, catalogue, mapped)), progress)
        _swap_halves(model, catalogue)
    model.nf4_catalogue = catalogue


def _destinations(
    model: comfy.model_base.BaseModel, catalogue: Catalogue, mapped: Collection[torch.nn.Module]
) -> Iterator[PackedMemory | DenseMemory]:
    """Every part of every tensor that the model has, with the memory that it goes to."""
    parameters = dict(model.diffusion_model.named_parameters())
    modules = dict(model.diffusion_model.named_modules())
    for name, source in model_names(model, catalogue).items():
        tensor = catalogue.transformer[source]
        linear = modules.get(name.removesuffix(".weight"))
        if isinstance(linear, Linear4bit) and name.endswith(".weight"):
            yield from _of_linear(linear, tensor, is_mapped=linear in mapped)
        elif name in parameters:  # else not of this model: `build_flux` has logged it
            yield from _of_parameter(parameters[name], tensor)


def _of_linear(
    linear: Linear4bit, tensor: TransformerTensor, *, is_mapped: bool
) -> Iterator[PackedMemory | DenseMemory]:
    for part in memory_of(tensor, linear.tensors):
        yield replace(part, packed=None) if is_mapped and isinstance(part, PackedMemory) else part


def _of_parameter(parameter: torch.Tensor, tensor: TransformerTensor) -> Iterator[DenseMemory]:
    rows = parameter.split([part.shape[0] for part in tensor.parts]) if len(tensor.parts) > 1 else (parameter,)
    for part, values in zip(tensor.parts, rows, strict=True):
        assert isinstance(part, TensorEntry)  # what is packed has become a `Linear4bit`
        yield DenseMemory(part, values)


def _swap_halves(model: comfy.model_base.BaseModel, catalogue: Catalogue) -> None:
    """Swap the halves of the tensors whose halves the file has the other way round."""
    modules = dict(model.diffusion_model.named_modules())
    for name, source in model_names(model, catalogue).items():
        if catalogue.transformer[source].halves_swapped:
            path, _, kind = name.rpartition(".")
            for memory in _memory(modules[path], kind):
                swap_halves(memory)


def _memory(module: torch.nn.Module, kind: str) -> Iterable[torch.Tensor]:
    if isinstance(module, Linear4bit) and kind == "weight":
        (whole,) = module.tensors
        return whole.values()
    return (module.get_parameter(kind),)
