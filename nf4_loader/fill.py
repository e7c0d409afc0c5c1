"""The transformer's bytes, from its files into the host memory that a model is bound to."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import comfy.model_base
import torch

from .catalogue import Catalogue, TransformerTensor, Weight4bit
from .errors import CheckpointError
from .flux import model_names
from .header import TensorEntry
from .linear4bit import Linear4bit
from .linear_of_parts import LinearOfParts
from .quant_state import CODES, NestedAbsmax, expand_nested_absmax
from .read import FileSlice, read_slices

_CONVERTED_BYTES = 256 << 20
"""Dense tensors that are not in the model's dtype are read and converted in batches of this size."""

TORCH_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class _Packed:
    """A 4-bit weight, and the memory for its bytes (uint8) and its absmax (fp32)."""

    weight: Weight4bit
    packed: torch.Tensor
    absmax: torch.Tensor


@dataclass(frozen=True)
class _Dense:
    """A dense tensor, and the memory for its values, of equal shape and any dtype."""

    entry: TensorEntry
    values: torch.Tensor

    @property
    def needs_conversion(self) -> bool:
        return torch_dtype(self.entry) != self.values.dtype


def fill(model: comfy.model_base.BaseModel, catalogue: Catalogue, progress: Callable[[int], None]) -> None:
    """Read the transformer's tensors from the files into the host memory that ``model`` is bound to.

    Packed bytes and fp32 absmax go straight into place; nested absmax is expanded to fp32 and dense tensors of
    another dtype are converted on the way. ``progress`` gets byte counts that add up to
    ``catalogue.transformer_bytes``, less what the file has and the model does not.

    Raises:
        CheckpointError: a file ended early, could not be read, or has another code table than its type says.
    """
    with torch.inference_mode(False), torch.no_grad():
        wanted = list(_destinations(model, catalogue))
        packed = [item for item in wanted if isinstance(item, _Packed)]
        dense = [item for item in wanted if isinstance(item, _Dense)]
        _check_code_tables(catalogue, [item.weight for item in packed])
        tables = _read_nested_tables([item.weight for item in packed])
        direct = [piece for item in packed for piece in _slices(item, tables)]
        direct += [
            FileSlice(item.entry.path, item.entry.offset, item.values) for item in dense if not item.needs_conversion
        ]
        read_slices(direct, progress)
        for batch in _batches([item for item in dense if item.needs_conversion]):
            _convert(batch, progress)
        _swap_halves(model, catalogue)


def _destinations(model: comfy.model_base.BaseModel, catalogue: Catalogue) -> Iterator[_Packed | _Dense]:
    """Every part of every tensor that the model has, with the memory that it goes to."""
    parameters = dict(model.diffusion_model.named_parameters())
    modules = dict(model.diffusion_model.named_modules())
    for name, source in model_names(model, catalogue).items():
        tensor = catalogue.transformer[source]
        linear = modules.get(name.removesuffix(".weight"))
        if isinstance(linear, Linear4bit) and name.endswith(".weight"):
            yield from _of_linear(linear, tensor)
        elif name in parameters:  # else not of this model: `build_flux` has logged it
            yield from _of_parameter(parameters[name], tensor)


def _of_linear(linear: Linear4bit, tensor: TransformerTensor) -> Iterator[_Packed | _Dense]:
    packed_at = absmax_at = 0
    for i, part in enumerate(tensor.parts):
        if isinstance(part, TensorEntry):
            yield _Dense(part, linear.get_buffer(f"dense_{i}"))
        elif isinstance(linear, LinearOfParts):
            yield _Packed(part, linear.get_buffer(f"packed_{i}"), linear.get_buffer(f"absmax_{i}"))
        else:
            packed_end, absmax_end = packed_at + part.state.packed_bytes, absmax_at + part.state.absmax_count
            yield _Packed(part, linear.packed[packed_at:packed_end], linear.absmax[absmax_at:absmax_end])
            packed_at, absmax_at = packed_end, absmax_end


def _of_parameter(parameter: torch.Tensor, tensor: TransformerTensor) -> Iterator[_Dense]:
    rows = parameter.split([part.shape[0] for part in tensor.parts]) if len(tensor.parts) > 1 else (parameter,)
    for part, values in zip(tensor.parts, rows, strict=True):
        assert isinstance(part, TensorEntry)  # what is packed has become a `Linear4bit`
        yield _Dense(part, values)


def _slices(item: _Packed, tables: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Sequence[FileSlice]:
    weight, absmax = item.weight, item.absmax
    packed = FileSlice(weight.packed.path, weight.packed.offset, item.packed)
    if weight.state.nested is None:
        return packed, FileSlice(weight.absmax.path, weight.absmax.offset, absmax)
    expand = functools.partial(_expand, weight.state.nested, absmax, *tables[weight.name])
    return packed, FileSlice(weight.absmax.path, weight.absmax.offset, _codes_of(absmax), expand)


def _codes_of(absmax: torch.Tensor) -> torch.Tensor:
    """Where the uint8 codes of ``absmax`` are read to: its own first quarter, so that they take no other memory."""
    return absmax.view(torch.uint8)[: absmax.numel()]


def _expand(nested: NestedAbsmax, absmax: torch.Tensor, scales: torch.Tensor, table: torch.Tensor) -> None:
    """Turn the codes in ``absmax`` into its fp32 values."""
    absmax.numpy()[:] = expand_nested_absmax(nested, _codes_of(absmax), scales, table).numpy()


def _batches(items: Sequence[_Dense]) -> Iterator[list[_Dense]]:
    batch: list[_Dense] = []
    for item in items:
        if batch and sum(other.entry.nbytes for other in (*batch, item)) > _CONVERTED_BYTES:
            yield batch
            batch = []
        batch.append(item)
    yield batch


def _convert(batch: Iterable[_Dense], progress: Callable[[int], None]) -> None:
    sources = [(item, torch.empty(item.values.shape, dtype=torch_dtype(item.entry))) for item in batch]
    read_slices([FileSlice(item.entry.path, item.entry.offset, source) for item, source in sources], progress)
    for item, source in sources:
        item.values.copy_(source)


def _swap_halves(model: comfy.model_base.BaseModel, catalogue: Catalogue) -> None:
    """Of the tensors that a file has the other way round. Rows lie one after the other and halves are whole blocks, so
    to swap them is to turn packed bytes, absmax or dense values by half."""
    modules = dict(model.diffusion_model.named_modules())
    for name, source in model_names(model, catalogue).items():
        if catalogue.transformer[source].halves_swapped:
            path, _, kind = name.rpartition(".")
            for turned in _memory(modules[path], kind):
                turned.copy_(turned.roll(turned.numel() // 2).clone())


def _memory(module: torch.nn.Module, kind: str) -> Sequence[torch.Tensor]:
    if isinstance(module, Linear4bit) and kind == "weight":
        return module.packed, module.absmax
    return (module.get_parameter(kind),)


def torch_dtype(entry: TensorEntry) -> torch.dtype:
    """The dtype of a dense tensor.

    Raises:
        CheckpointError: weights are never of this dtype.
    """
    if entry.dtype not in TORCH_DTYPES:
        raise CheckpointError(
            entry.path,
            f"{entry.name}: a dense tensor of dtype {entry.dtype}; expected one of {', '.join(TORCH_DTYPES)}. "
            "The file is damaged or was made by a tool that this node does not know.",
        )
    return TORCH_DTYPES[entry.dtype]


def _read_small(entries: Sequence[TensorEntry]) -> list[torch.Tensor]:
    tensors = [torch.empty(entry.shape, dtype=torch.float32) for entry in entries]
    slices = [FileSlice(entry.path, entry.offset, tensor) for entry, tensor in zip(entries, tensors, strict=True)]
    read_slices(slices, lambda _: None)
    return [tensor.view(-1) for tensor in tensors]


def _check_code_tables(catalogue: Catalogue, weights: Sequence[Weight4bit]) -> None:
    tables = _read_small([weight.quant_map for weight in weights])
    for weight, table in zip(weights, tables, strict=True):
        if not torch.allclose(table, torch.tensor(CODES[weight.state.quant_type]), rtol=0, atol=1e-6):
            raise CheckpointError(
                catalogue.path,
                f"{weight.name}.quant_map: it is not the {weight.state.quant_type} code table ({table.tolist()}). "
                "The file is damaged or was made by a tool that this node does not know.",
            )


def _read_nested_tables(weights: Sequence[Weight4bit]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """nested_absmax and nested_quant_map of each weight that has them."""
    nested = [weight for weight in weights if weight.state.nested is not None]
    small = _read_small([entry for weight in nested for entry in (weight.nested_absmax, weight.nested_map) if entry])
    return {weight.name: tables for weight, *tables in zip(nested, small[::2], small[1::2], strict=True)}  # type: ignore[misc]
