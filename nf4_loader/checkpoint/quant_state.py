"""What bitsandbytes writes beside a packed 4-bit weight, read without bitsandbytes.

Format: ``bitsandbytes.functional.QuantState.as_dict(packed=True)``, unchanged from 0.42 to 0.50. For a
weight ``L.weight`` of logical shape (out, in), n = out * in elements and b = ceil(n / blocksize) blocks:

========================================== ============== ==========================================
``L.weight``                               (n + 1) // 2 B two codes a byte, row major, high nibble first
``L.weight.absmax``                        b              fp32; uint8 when nested
``L.weight.quant_map``                     16             fp32, the code table
``L.weight.nested_absmax``                 ceil(b / 256)  fp32, when nested
``L.weight.nested_quant_map``              256            fp32, when nested
``L.weight.quant_state.bitsandbytes__nf4`` JSON as uint8  shape, blocksize, dtype, nested offset
========================================== ============== ==========================================
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch

QuantType = Literal["nf4", "fp4"]

NF4_CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The sixteen NF4 values (QLoRA, https://arxiv.org/abs/2305.14314, appendix E)."""

_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4_CODE = tuple(sign * value / 12.0 for sign in (1.0, -1.0) for value in _FP4_TWELFTHS)
"""The sixteen FP4 values by bit pattern, normalised to 1 (``bitsandbytes.functional.get_4bit_type``)."""

CODES: dict[QuantType, tuple[float, ...]] = {"nf4": NF4_CODE, "fp4": FP4_CODE}

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

MAX_QUANT_STATE_BYTES = 1 << 16
"""Real ones have less than 200."""

NESTED_MAP = 256
"""Values of a nested_quant_map."""

QUANT_STATE = ".quant_state.bitsandbytes__"
"""In the name of each quant state, between the weight's name and ``nf4`` or ``fp4``."""

NESTED_BLOCKSIZE = 256
"""The blocksize of nested absmax that bitsandbytes writes. Others are read, too."""

_EXPANDED_AT_ONCE = 1 << 16
"""Values of absmax: whole blocks of any blocksize, and few enough to stay in a core's cache."""

_FP32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class NestedAbsmax:
    """Second quantisation of ``count`` values of absmax: ``map[absmax] * nested_absmax[i // blocksize] + offset``."""

    count: int
    blocksize: int

    @property
    def blocks(self) -> int:
        """Values of nested_absmax."""
        return -(-self.count // self.blocksize)


class NestedTables(NamedTuple):
    """The tables that expand nested absmax, in fp32: nested_absmax (blocks,), its map (256,), the offset (1,).

    In a weight that was fused of several parts, nested_absmax and the offsets of the parts are one after the other, and
    the map is (parts, 256).
    """

    absmax: torch.Tensor
    map: torch.Tensor
    offset: torch.Tensor

    @staticmethod
    def shapes(nested: Sequence[NestedAbsmax]) -> dict[str, tuple[int, ...]]:
        """The shape of each field for a weight whose absmax is nested in these parts."""
        return {
            "absmax": (sum(part.blocks for part in nested),),
            "map": (len(nested), NESTED_MAP),
            "offset": (len(nested),),
        }

    def of_parts(self, nested: Sequence[NestedAbsmax]) -> "list[NestedTables]":
        """Each part's own, as views."""
        absmax = self.absmax.split([part.blocks for part in nested])
        return [NestedTables(*part) for part in zip(absmax, self.map, self.offset.split(1), strict=True)]


@dataclass(frozen=True)
class QuantState:
    """How the bytes of one 4-bit weight are to be read. ``shape`` is the logical (out, in).

    ``nested`` says how absmax is quantised once more. It is empty if absmax is fp32; a weight of a file has one item, a
    fused weight one for each of its parts. The offset is not in it, so that layers of a kind have equal ``nested``, and
    torch compiles them once.
    """

    quant_type: QuantType
    blocksize: int
    shape: tuple[int, int]
    nested: tuple[NestedAbsmax, ...] = ()
    nested_offset: float = 0.0

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed codes."""
        return (self.numel + 1) // 2

    @property
    def absmax_count(self) -> int:
        """Values of absmax, whatever their dtype."""
        return -(-self.numel // self.blocksize)

    def tensors(self, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor that holds the weight; ``dtype`` is for dense parts."""
        absmax = torch.uint8 if self.nested else torch.float32
        tables = NestedTables.shapes(self.nested) if self.nested else {}
        return {
            "packed": ((self.packed_bytes,), torch.uint8),
            "absmax": ((self.absmax_count,), absmax),
            **{f"nested_{name}": (shape, torch.float32) for name, shape in tables.items()},
        }


@dataclass(frozen=True)
class DensePart:
    """Rows of a weight that are not quantised, between others that are. ``shape`` is (rows, in)."""

    shape: tuple[int, int]

    def tensors(self, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor that holds the rows: one of ``dtype``."""
        return {"dense": (self.shape, dtype)}


def parse_quant_state(raw: bytes) -> QuantState:
    """Parse the JSON of a ``quant_state.bitsandbytes__*`` tensor.

    Raises:
        ValueError: it is not JSON, or a field is missing or has a value that cannot be used.
    """
    if raw and not any(raw):
        raise ValueError("its quant state is all zeros: a part of the file was never downloaded, such as by a torrent")
    try:
        fields = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its quant state is not readable as JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"its quant state is a JSON {type(fields).__name__}, not an object")
    quant_type = fields.get("quant_type")
    if quant_type not in tuple(CODES):
        raise ValueError(f"its quant state says quant_type {quant_type!r}; known are nf4 and fp4")
    blocksize = fields.get("blocksize")
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        raise ValueError(f"its quant state says blocksize {blocksize!r}; known are {BLOCKSIZES}")
    shape = fields.get("shape")
    if not (
        isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and 0 < size < 1 << 31 for size in shape)
    ):
        raise ValueError(f"its quant state says shape {shape!r}, not the [out, in] of a Linear")
    state = QuantState(cast(QuantType, quant_type), blocksize, (shape[0], shape[1]))
    return _nested(state, fields) if "nested_blocksize" in fields else state


def _nested(state: QuantState, fields: dict[str, Any]) -> QuantState:
    blocksize, offset = fields["nested_blocksize"], fields.get("nested_offset")
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        raise ValueError(f"its quant state says nested_blocksize {blocksize!r}; known are {BLOCKSIZES}")
    if isinstance(offset, bool) or not isinstance(offset, int | float) or not abs(offset) <= _FP32_MAX:
        raise ValueError(f"its quant state says nested_offset {offset!r}, not a number in fp32")
    return replace(state, nested=(NestedAbsmax(state.absmax_count, blocksize),), nested_offset=float(offset))


def codes_of(absmax: torch.Tensor) -> torch.Tensor:
    """The memory for the uint8 codes of nested ``absmax`` (fp32, (b,)): its own first quarter."""
    return absmax.view(torch.uint8)[: absmax.numel()]


def expand_nested_absmax(nested: NestedAbsmax, absmax: torch.Tensor, tables: NestedTables) -> None:
    """Undo the second quantisation, in place.

    Args:
        nested: How many codes, in blocks of how many.
        absmax: fp32, (b,), with the codes in its `codes_of`. Becomes bit-equal to what
            ``bitsandbytes.functional.dequantize_4bit`` computes first.
        tables: Of one part.
    """
    # The threads that read the file run this. numpy releases Python's lock and starts no threads of its own, which
    # would wait for each other. It goes from the end, so that no code is overwritten before it has been read.
    values, codes = absmax.numpy(), codes_of(absmax).numpy()
    scales, table, offset = (tensor.numpy() for tensor in tables)
    for start in reversed(range(0, values.size, _EXPANDED_AT_ONCE)):
        chunk = values[start : start + _EXPANDED_AT_ONCE]
        # Given a mode, numpy writes to ``out`` without a buffer in between.
        np.take(table, codes[start : start + chunk.size].copy(), out=chunk, mode="clip")
        first = start // nested.blocksize
        last = -(-(start + chunk.size) // nested.blocksize)
        chunk *= np.repeat(scales[first:last], nested.blocksize)[: chunk.size]
        chunk += offset
