"""Parts of tensors, from their files into host memory: packed bytes, absmax, dense values in any dtype."""

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors import safe_open

from .errors import DAMAGED, CheckpointError
from .header import TensorEntry
from .quant_state import CODES, NestedTables, codes_of, expand_nested_absmax
from .read import FileSlice, read_slices, read_small
from .tensors import TransformerTensor, Weight4bit

CPU = torch.device("cpu")

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
class PackedMemory:
    """A 4-bit weight, and the memory for its bytes (uint8) and its absmax; None for what is not wanted.

    Without ``tables``, absmax becomes fp32, whatever the file has. With ``tables``, it stays nested (uint8) as in the
    file, and they are the memory for its tables.
    """

    weight: Weight4bit
    packed: torch.Tensor | None
    absmax: torch.Tensor | None
    tables: NestedTables | None = None


@dataclass(frozen=True)
class DenseMemory:
    """A dense tensor, and the memory for its values, in the same order and of any dtype."""

    entry: TensorEntry
    values: torch.Tensor

    @property
    def needs_conversion(self) -> bool:
        return torch_dtype(self.entry) != self.values.dtype


def read_parts(wanted: Sequence[PackedMemory | DenseMemory], progress: Callable[[int], None]) -> None:
    """Read each part into its memory.

    Packed bytes and absmax go straight into place. Nested absmax that is wanted in fp32 is expanded on the way, and
    dense tensors of another dtype are converted. ``progress`` receives byte counts that sum to the parts' ``nbytes``.

    Raises:
        CheckpointError: a file ended early, could not be read, or has another code table than its type says.
    """
    packed = [item for item in wanted if isinstance(item, PackedMemory)]
    dense = [item for item in wanted if isinstance(item, DenseMemory)]
    _check_code_tables([item.weight for item in packed])
    tables = _read_nested_tables(packed)
    direct = [piece for item in packed for piece in _slices(item, tables)]
    direct += [
        FileSlice(item.entry.path, item.entry.offset, item.values) for item in dense if not item.needs_conversion
    ]
    read_slices(direct, progress)
    for batch in _batches([item for item in dense if item.needs_conversion]):
        _convert(batch, progress)


def read_fused(tensor: TransformerTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed bytes (uint8) and absmax (fp32) of a tensor that is ``fused``, as `quant_state` describes them."""
    state = tensor.fused
    assert state is not None
    packed = torch.empty(state.packed_bytes, dtype=torch.uint8)
    absmax = torch.empty(state.absmax_count, dtype=torch.float32)
    read_parts(list(_shares(tensor, packed, absmax, None)), lambda _: None)
    if tensor.halves_swapped:
        swap_halves(packed)
        swap_halves(absmax)
    return packed, absmax


def memory_of(
    tensor: TransformerTensor, tensors: Sequence[Mapping[str, torch.Tensor]]
) -> Iterator[PackedMemory | DenseMemory]:
    """Each part of ``tensor`` with its memory in ``tensors``, which has the tensors of each of its `held`."""
    if tensor.fused is not None:
        (whole,) = tensors
        tables = NestedTables(*(whole[f"nested_{name}"] for name in NestedTables._fields)) if tensor.nested else None
        yield from _shares(tensor, whole["packed"], whole["absmax"], tables)
        return
    for part, own in zip(tensor.parts, tensors, strict=True):
        if isinstance(part, TensorEntry):
            yield DenseMemory(part, own["dense"])
        else:
            yield PackedMemory(part, own["packed"], own["absmax"])


def _shares(
    tensor: TransformerTensor, packed: torch.Tensor, absmax: torch.Tensor, tables: NestedTables | None
) -> Iterator[PackedMemory]:
    """Each part of a tensor that is ``fused``, with its share of the memory of the whole."""
    states = [weight.state for weight in tensor.weights4bit]
    shares = (packed.split([state.packed_bytes for state in states]), absmax.split([s.absmax_count for s in states]))
    own_tables = [None] * len(states) if tables is None else tables.of_parts(tensor.nested)
    for weight, own_packed, own_absmax, own in zip(tensor.weights4bit, *shares, own_tables, strict=True):
        yield PackedMemory(weight, own_packed, own_absmax, own)


def read_entries(entries: Collection[TensorEntry]) -> dict[str, torch.Tensor]:
    """Tensors of any dtype and of any number of files, by their names, as safetensors maps them."""
    tensors: dict[str, torch.Tensor] = {}
    for path in {entry.path for entry in entries}:
        with safe_open(path, framework="pt") as file:
            tensors |= {entry.name: file.get_tensor(entry.name) for entry in entries if entry.path == path}
    return tensors


def swap_halves(tensor: torch.Tensor) -> None:
    """Swap the first and second half in place: packed bytes, absmax or dense values, all of which lie row after row."""
    flat = tensor.view(-1)
    flat.copy_(flat.roll(flat.numel() // 2))


def _slices(item: PackedMemory, tables: Mapping[str, NestedTables]) -> Sequence[FileSlice]:
    weight, absmax = item.weight, item.absmax
    packed = () if item.packed is None else (FileSlice(weight.packed.path, weight.packed.offset, item.packed),)
    if absmax is None:
        return packed
    if not weight.state.nested or item.tables is not None:
        return *packed, FileSlice(weight.absmax.path, weight.absmax.offset, absmax)
    (nested,) = weight.state.nested
    expand = functools.partial(expand_nested_absmax, nested, absmax, tables[weight.name])
    return *packed, FileSlice(weight.absmax.path, weight.absmax.offset, codes_of(absmax), expand)


def _batches(items: Sequence[DenseMemory]) -> Iterator[list[DenseMemory]]:
    batch: list[DenseMemory] = []
    nbytes = 0
    for item in items:
        if batch and nbytes + item.entry.nbytes > _CONVERTED_BYTES:
            yield batch
            batch, nbytes = [], 0
        batch.append(item)
        nbytes += item.entry.nbytes
    yield batch


def _convert(batch: Iterable[DenseMemory], progress: Callable[[int], None]) -> None:
    sources = [(item, torch.empty(item.values.shape, dtype=torch_dtype(item.entry))) for item in batch]
    read_slices([FileSlice(item.entry.path, item.entry.offset, source) for item, source in sources], progress)
    for item, source in sources:
        item.values.copy_(source)


def torch_dtype(entry: TensorEntry) -> torch.dtype:
    """The dtype of a dense tensor.

    Raises:
        CheckpointError: weights are never of this dtype.
    """
    if entry.dtype not in TORCH_DTYPES:
        raise CheckpointError(
            entry.path,
            f"{entry.name}: a dense tensor of dtype {entry.dtype}; expected one of {', '.join(TORCH_DTYPES)}. "
            f"{DAMAGED}",
        )
    return TORCH_DTYPES[entry.dtype]


def _check_code_tables(weights: Sequence[Weight4bit]) -> None:
    tables = torch.empty((len(weights), 16), dtype=torch.float32)
    _read_fp32([(weight.quant_map, table) for weight, table in zip(weights, tables, strict=True)])
    expected = torch.tensor([CODES[weight.state.quant_type] for weight in weights]).view_as(tables)
    is_right = torch.isclose(tables, expected, rtol=0, atol=1e-6).all(dim=1).tolist()
    for weight, table, is_its_own in zip(weights, tables, is_right, strict=True):
        if not is_its_own:
            raise CheckpointError(
                weight.quant_map.path,
                f"{weight.name}.quant_map: it is not the {weight.state.quant_type} code table ({table.tolist()}). "
                f"{DAMAGED}",
            )


def _read_nested_tables(items: Sequence[PackedMemory]) -> dict[str, NestedTables]:
    """The tables of each weight whose absmax is nested, in the memory for them or in memory of their own."""
    tables: dict[str, NestedTables] = {}
    wanted: list[tuple[TensorEntry, torch.Tensor]] = []
    for weight, own in ((item.weight, item.tables) for item in items):
        if weight.nested_absmax is None or weight.nested_map is None:
            continue
        shapes = NestedTables.shapes(weight.state.nested).values()
        tables[weight.name] = own or NestedTables(*(torch.empty(shape, dtype=torch.float32) for shape in shapes))
        absmax, table, offset = tables[weight.name]
        wanted += [(weight.nested_absmax, absmax), (weight.nested_map, table)]
        offset.fill_(weight.state.nested_offset)
    _read_fp32(wanted)
    return tables


def _read_fp32(wanted: Iterable[tuple[TensorEntry, torch.Tensor]]) -> None:
    read_small([FileSlice(entry.path, entry.offset, memory) for entry, memory in wanted])
