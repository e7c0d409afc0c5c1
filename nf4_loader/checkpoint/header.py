"""The header of a safetensors file, checked in full before a byte of it is trusted.

Format: https://github.com/huggingface/safetensors#format - eight bytes (little endian) with the
length of a JSON object, the JSON object, then the tensors' bytes without gaps.
"""

import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from .broken_download import BEGINNING, CUT_SHORT, is_unfinished, what_came_instead, what_to_do
from .errors import CheckpointError, reason

MAX_HEADER_BYTES = 100_000_000
"""The safetensors library's own limit: trainers write megabytes of metadata."""

_MAX_TENSORS = 50_000
"""Twenty times what the largest Flux file has. Only metadata makes a header of a real file large."""

_MAX_NAME = 500
"""Characters of a tensor's name."""

_MAX_DIMENSIONS = 64
"""PyTorch makes no tensor of more."""

BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "U32": 32,
    "I32": 32,
    "U64": 64,
    "I64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
    "C64": 64,
}
"""Bits of one element, by safetensors dtype name."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: its bytes are ``[offset, offset + nbytes)`` of the whole file ``path``."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a checkpoint holds, in one file or several. ``path`` is what was asked for; ``tensors`` maps full names to
    entries, in file order."""

    path: Path
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of ``path``; no tensor is read.

    Raises:
        CheckpointError: the file is missing, is not safetensors, or its header is not consistent
            with itself and with the size of the file.
    """
    try:
        raw, size = _read_raw(path)
    except FileNotFoundError:
        problem = "there is no such file. Check the name; in ComfyUI's page press R and pick it again."
        raise CheckpointError(path, problem) from None
    except OSError as error:
        raise CheckpointError(path, f"it cannot be read ({reason(error)}).") from error
    return Header(path, *_parse(path, raw, data_start=8 + len(raw), file_size=size))


def _read_raw(path: Path) -> tuple[bytes, int]:
    """The bytes of the header's JSON, and the size of the file."""
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
        raise CheckpointError(path, "it cannot be read: it is no ordinary file. Pick a .safetensors file.")
    if unfinished := is_unfinished(path):
        raise CheckpointError(path, unfinished)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if not size or length > MAX_HEADER_BYTES or (length == 0 and size > 8):
            raise CheckpointError(path, _what_else_it_is(prefix + file.read(BEGINNING), size, length))
        if len(prefix) < 8:
            raise CheckpointError(
                path, f"it has {len(prefix)} bytes, too few for a safetensors file. {what_to_do(path)}"
            )
        if 8 + length > size:
            problem = f"the header should be {length:,} bytes long, the whole file has {size:,}. {what_to_do(path)}"
            raise CheckpointError(path, problem)
        return file.read(length), size


def _what_else_it_is(beginning: bytes, size: int, length: int) -> str:
    """What a file is whose first eight bytes give an impossible ``length``, in sentences."""
    if beginning.startswith(b"GGUF"):
        return (
            "this is a GGUF file. Load it with 'Unet Loader (GGUF)' of the ComfyUI-GGUF package, or text encoders with "
            "its 'DualCLIPLoader (GGUF)'."
        )
    if beginning.startswith((b"PK\x03\x04", b"\x80")):
        return "this is a PyTorch pickle (.ckpt or .pt). Convert it to .safetensors, or download a file of that kind."
    return what_came_instead(beginning, size) or (
        f"its first bytes give a header of {length:,} bytes, more than the {MAX_HEADER_BYTES:,} that safetensors "
        "allows. This is no safetensors file, or it is damaged: download it again."
    )


def _parse(
    path: Path, raw: bytes, data_start: int, file_size: int
) -> tuple[Mapping[str, TensorEntry], Mapping[str, str]]:
    if raw.count(b'"data_offsets"') > _MAX_TENSORS:  # before they are parsed, which takes long
        raise CheckpointError(path, f"its header lists more than {_MAX_TENSORS:,} tensors. No model has so many.")
    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=object_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"its header is not readable as JSON ({error}). {CUT_SHORT}") from None
    if not isinstance(document, dict):
        raise CheckpointError(path, f"its header is a JSON {type(document).__name__}, not an object. {CUT_SHORT}")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        metadata = {}
    tensors = [_entry(path, name, fields, data_start) for name, fields in document.items()]
    tensors.sort(key=lambda entry: (entry.offset, entry.nbytes))
    _check_cover(path, tensors, data_start, file_size)
    return {entry.name: entry for entry in tensors}, {str(k): str(v) for k, v in metadata.items()}


def object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"{name!r} is there twice")
        result[name] = value
    return result


def _entry(path: Path, name: str, fields: Any, data_start: int) -> TensorEntry:
    if len(name) > _MAX_NAME or not name.isprintable():
        raise CheckpointError(path, f"{name[:80]!r}: this is no name of a tensor. {CUT_SHORT}")
    dtype = fields.get("dtype") if isinstance(fields, dict) else None
    shape = fields.get("shape") if isinstance(fields, dict) else None
    offsets = fields.get("data_offsets") if isinstance(fields, dict) else None
    if not (_is_sizes(shape) and _is_sizes(offsets) and len(offsets) == 2 and isinstance(dtype, str)):
        raise CheckpointError(path, f"{name}: its header entry is malformed ({str(fields)[:120]}). {CUT_SHORT}")
    if dtype not in BITS:
        raise CheckpointError(
            path, f"{name}: unknown dtype {dtype!r}; known are {', '.join(BITS)}. Update this package, or the file."
        )
    begin, end = offsets
    expected = (math.prod(shape) * BITS[dtype] + 7) // 8
    if end - begin != expected:
        raise CheckpointError(
            path,
            f"{name}: {dtype} of shape {tuple(shape)} needs {expected:,} bytes; "
            f"the header gives it {end - begin:,} ([{begin}, {end})). {CUT_SHORT}",
        )
    return TensorEntry(path, name, dtype, tuple(shape), data_start + begin, end - begin)


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) <= _MAX_DIMENSIONS
        and all(type(item) is int and 0 <= item < 1 << 63 for item in value)
    )


def _check_cover(path: Path, tensors: list[TensorEntry], data_start: int, file_size: int) -> None:
    position = data_start
    for entry in tensors:
        if entry.offset < position:
            raise CheckpointError(path, f"{entry.name}: its bytes overlap those of the tensor before it. {CUT_SHORT}")
        if entry.offset > position:
            raise CheckpointError(
                path, f"{entry.name}: {entry.offset - position:,} bytes before it belong to no tensor. {CUT_SHORT}"
            )
        position += entry.nbytes
    if position != file_size:
        share = f" ({100 * file_size / position:.0f} % of it)" if file_size < position else ""
        raise CheckpointError(
            path, f"its tensors end at byte {position:,}; the file has {file_size:,} bytes{share}. {what_to_do(path)}"
        )


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key that puts ``blocks.2`` before ``blocks.10``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]{1,18})", name)]
