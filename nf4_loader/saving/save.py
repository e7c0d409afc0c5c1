"""Quantises a transformer or a text encoder and writes it, layer by layer: a file appears whole, or not at all."""

import fnmatch
import json
import logging
import math
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch

from ...memory import GIB
from ..checkpoint.errors import CheckpointError, reason
from ..checkpoint.header import TensorEntry, read_header
from ..checkpoint.quant_state import QUANT_STATE, QuantState
from ..checkpoint.read_parts import CPU, TORCH_DTYPES, read_fused
from ..checkpoint.tensors import TransformerTensor, Weight4bit
from .atomic_file import remove_abandoned, whole_file
from .quantise import QuantSettings, described, quantise

logger = logging.getLogger(__name__)

VERSION = "0.2.0"

_COPY_BYTES = 16 << 20

_TENSORS_AHEAD = 8
"""How many tensors may wait to be written while the next ones are quantised: 200 MB at most."""

_HEADER_ENTRY_BYTES = 140
"""Upper bound of what one tensor takes in the header, without its name."""

_ENDS = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", f"{QUANT_STATE}nf4")
_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()} | {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
}


@dataclass(frozen=True)
class Source:
    """A tensor to be saved.

    Attributes:
        name: Of ComfyUI's model, without prefix.
        shape: The logical shape.
        read: Gives its dense values, patches applied, in any float dtype, on a device.
        stored: The same values in a file, if there are any. What need not change is copied from there.
        is_layer: Whether its weight may be quantised; of a transformer, all tensors, whose names get the prefix.
        is_embedding: Whether it is the weight of an embedding, which is never quantised.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[torch.device], torch.Tensor]
    stored: TransformerTensor | None = None
    is_layer: bool = True
    is_embedding: bool = False


_Tensor = tuple[str, torch.Tensor | TensorEntry]
"""A name in the new file, and the tensor's values or where they are in another file."""


def save_quantised(
    path: Path,
    sources: Sequence[Source],
    settings: QuantSettings,
    *,
    prefix: str = "",
    keep_dense: Sequence[str] = (),
    metadata: Mapping[str, str] = MappingProxyType({}),
    device: torch.device = CPU,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Write ``sources`` to ``path``: weights of layers in 4 bits, everything else as it is.

    Only a few tensors are in memory at a time: they are written while the next ones are read. A weight that is stored
    in 4 bits of the same type is not quantised again: its bytes are copied, and its absmax is expanded or nested if
    ``settings`` say so. A weight in another 4-bit type is quantised again, and the log says so.

    Args:
        path: The new file. It appears in one step, when all bytes are on disk.
        sources: In the order of the file.
        settings: How to quantise.
        prefix: Put before the names of layers.
        keep_dense: Shell patterns of layers whose weights stay dense, such as ``img_in`` or ``final_layer.*``.
        metadata: Put into the header, beside the version and the settings.
        device: Where to quantise.
        progress: Called with the number of elements after each tensor. What it raises ends the saving.

    Raises:
        CheckpointError: the disk has no room, the file cannot be written, bitsandbytes is missing, a source has changed
            or would be replaced, or a pattern in ``keep_dense`` fits no layer.
    """
    _require_bitsandbytes(path)
    _require_layers(path, sources, keep_dense)
    _require_unchanged(path, sources)
    _say_what_is_quantised_again(path, sources, settings, keep_dense)
    metadata = _metadata(settings, keep_dense) | dict(metadata)
    tensors = _tensors(sources, settings, prefix, keep_dense, device, progress)
    try:
        remove_abandoned(path.parent)
        _require_room(path, sources, settings, keep_dense)
        with whole_file(path) as file:
            _write(path, file, tensors, _room(sources, prefix, metadata), metadata)
    except OSError as error:
        raise CheckpointError(path, f"writing it failed ({reason(error)}). Nothing was changed there.") from error


def layer_patterns(text: str) -> list[str]:
    """``keep_dense`` of `save_quantised` from a user's text: patterns with commas between them."""
    return [layer.strip() for layer in text.split(",") if layer.strip()]


def _require_bitsandbytes(path: Path) -> None:
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:  # a native library fails to load in any way
        raise CheckpointError(
            path,
            f"quantising needs bitsandbytes, which does not load ({type(error).__name__}: {error}). Install it with "
            "the Python that runs ComfyUI: pip install 'bitsandbytes>=0.50'.",
        ) from error


def _require_layers(path: Path, sources: Sequence[Source], keep_dense: Sequence[str]) -> None:
    layers = [source.name.removesuffix(".weight") for source in sources if _is_quantised(source, ())]
    for pattern in keep_dense:
        if not any(fnmatch.fnmatchcase(layer, pattern) for layer in layers):
            raise CheckpointError(
                path,
                f"no layer is called {pattern!r}, which shall stay dense. Layers have names such as {layers[0]}, and * "
                "stands for any text.",
            )


def _say_what_is_quantised_again(
    path: Path, sources: Sequence[Source], settings: QuantSettings, keep_dense: Sequence[str]
) -> None:
    stored = [source.stored for source in sources if source.stored is not None and _is_quantised(source, keep_dense)]
    again = [tensor for tensor in stored if tensor.weights4bit and _kept_state(tensor, settings) is None]
    if again:
        found = {weight.state.quant_type for tensor in again for weight in tensor.weights4bit}
        logger.warning(
            "NF4: %s: %d weights that are in 4 bits already (%s) are quantised again, to %s, which makes them less "
            "exact. Save the model in its own type, or from a dense, fp8 or GGUF file.",
            path.name,
            len(again),
            ", ".join(sorted(found)),
            settings.quant_type,
        )


def _require_room(path: Path, sources: Sequence[Source], settings: QuantSettings, keep_dense: Sequence[str]) -> None:
    needed = 0
    for source in sources:
        numel = math.prod(source.shape)
        in_4_bits = _is_quantised(source, keep_dense)
        needed += numel // 2 + 4 * numel // settings.blocksize if in_4_bits else 2 * numel
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise CheckpointError(
            path,
            f"the new file takes about {needed / GIB:.1f} GiB; {free / GIB:.1f} GiB are free on the disk that it goes "
            "to. Make room there, or save it elsewhere.",
        )


def _is_quantised(source: Source, keep_dense: Sequence[str]) -> bool:
    if not (source.is_layer and source.name.endswith(".weight") and len(source.shape) == 2) or source.is_embedding:
        return False
    layer = source.name.removesuffix(".weight")
    return not any(fnmatch.fnmatchcase(layer, pattern) for pattern in keep_dense)


def _tensors(
    sources: Sequence[Source],
    settings: QuantSettings,
    prefix: str,
    keep_dense: Sequence[str],
    device: torch.device,
    progress: Callable[[int], None],
) -> Iterator[_Tensor]:
    for source in sources:
        name = prefix + source.name if source.is_layer else source.name
        stored = source.stored
        if _is_quantised(source, keep_dense):
            yield from _in_4_bits(source, name, settings, device)
        elif stored is not None and isinstance(stored.parts[0], TensorEntry) and _is_as_it_is(stored):
            yield name, stored.parts[0]
        else:
            yield name, source.read(CPU)
        progress(math.prod(source.shape))


def _in_4_bits(source: Source, name: str, settings: QuantSettings, device: torch.device) -> Iterator[_Tensor]:
    stored = source.stored
    state = _kept_state(stored, settings) if stored is not None else None
    if stored is None or state is None:
        for end, tensor in quantise(source.read(device), settings).items():
            yield name + end, tensor
        return
    first = stored.weights4bit[0]
    if _is_as_it_is(stored) and bool(first.state.nested) == settings.nested:
        for entry in first.entries:
            yield name + entry.name.removeprefix(first.name), entry
        return
    kept = replace(settings, blocksize=state.blocksize)
    for end, tensor in described(*read_fused(stored), state.shape, torch.bfloat16, kept).items():
        yield name + end, tensor


def _kept_state(stored: TransformerTensor, settings: QuantSettings) -> QuantState | None:
    """The quant state of the stored weight, if its 4-bit values are kept; None if it has to be quantised again."""
    state = stored.fused
    return state if state is not None and state.quant_type == settings.quant_type else None


def _is_as_it_is(stored: TransformerTensor) -> bool:
    """Whether a file has it just as it is saved: its bytes in the same order, and its shape."""
    return len(stored.parts) == 1 and not stored.halves_swapped and not stored.flattened


def _require_unchanged(path: Path, sources: Sequence[Source]) -> None:
    headers: dict[Path, Mapping[str, TensorEntry]] = {}
    parts = [part for source in sources if source.stored is not None for part in source.stored.parts]
    for entry in [entry for part in parts for entry in (part.entries if isinstance(part, Weight4bit) else (part,))]:
        if entry.path not in headers:
            headers[entry.path] = read_header(entry.path).tensors
            if path.exists() and path.samefile(entry.path):
                raise CheckpointError(path, "it would replace a file that it is made of. Choose another name.")
        if headers[entry.path].get(entry.name) != entry:
            raise CheckpointError(entry.path, "the file has changed since it was loaded. Load it again, then save.")


def _metadata(settings: QuantSettings, keep_dense: Sequence[str]) -> dict[str, str]:
    return {
        "format": "pt",
        "flux_nf4.version": VERSION,
        "flux_nf4.settings": json.dumps(asdict(settings) | {"keep_dense": list(keep_dense)}),
    }


def _room(sources: Sequence[Source], prefix: str, metadata: Mapping[str, str]) -> int:
    """Upper bound of the header's size. The header is written last, when the length of each quant state is known;
    unused room is filled with spaces, as the format allows."""
    names = [prefix + source.name + end for source in sources for end in _ENDS]
    entries = sum(len(json.dumps(name)) + _HEADER_ENTRY_BYTES for name in names)
    return -(-(entries + len(json.dumps({"__metadata__": dict(metadata)}))) // 8) * 8


def _write(path: Path, file: BinaryIO, tensors: Iterator[_Tensor], room: int, metadata: Mapping[str, str]) -> None:
    file.write(bytes(8 + room))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    with ThreadPoolExecutor(1, thread_name_prefix="nf4-write") as writer:
        under_way: deque[Future[None]] = deque()
        for name, tensor in _aligned(tensors):
            dtype = tensor.dtype if isinstance(tensor, TensorEntry) else _DTYPE_NAMES[tensor.dtype]
            offsets = [position, position + tensor.nbytes]
            entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
            position += tensor.nbytes
            under_way.append(writer.submit(_append, tensor, file))
            if len(under_way) > _TENSORS_AHEAD:
                under_way.popleft().result()
        for written in under_way:
            written.result()
    raw = json.dumps(entries, separators=(",", ":")).encode()
    if len(raw) > room:
        raise CheckpointError(
            path, f"its header takes {len(raw):,} bytes, more than the {room:,} kept for it. Nothing was changed there."
        )
    file.seek(0)
    file.write(room.to_bytes(8, "little") + raw.ljust(room))


def _aligned(tensors: Iterator[_Tensor]) -> Iterator[_Tensor]:
    """Tensors of odd sizes (quant states) last: the others stay 8-byte aligned for readers that map the file."""
    odd: list[_Tensor] = []
    for name, tensor in tensors:
        if tensor.nbytes % 8:
            odd.append((name, tensor))
        else:
            yield name, tensor
    yield from odd


def _append(tensor: torch.Tensor | TensorEntry, file: BinaryIO) -> None:
    if isinstance(tensor, TensorEntry):
        _copy(tensor, file)
    else:
        file.write(memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]


def _copy(entry: TensorEntry, file: BinaryIO) -> None:
    with entry.path.open("rb") as source:
        source.seek(entry.offset)
        left = entry.nbytes
        while left and (read := source.read(min(left, _COPY_BYTES))):
            file.write(read)
            left -= len(read)
    if left:
        raise CheckpointError(entry.path, f"{entry.name}: the file ended while it was copied. Load it again.")
