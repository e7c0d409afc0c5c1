"""Safetensors files that take no room: a header, some bytes, and holes."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

_SIZES = {"U8": 1, "I8": 1, "F8_E4M3": 1, "F16": 2, "BF16": 2, "F32": 4}

Tensor = tuple[str, tuple[int, ...], bytes | None]
"""Dtype, shape, and the bytes that it begins with; the rest reads as zero."""


def write_sparse(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file of ``tensors``, in their order."""
    entries: dict[str, object] = {}
    content: dict[int, bytes] = {}
    position = 0
    for name, (dtype, shape, raw) in tensors.items():
        nbytes = _SIZES[dtype] * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        content[position] = raw or b""
        position += nbytes
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        start = file.tell()
        for offset, raw in content.items():
            file.seek(start + offset)
            file.write(raw)
        file.truncate(start + position)
