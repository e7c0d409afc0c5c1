"""4-bit dequantisation and matmul by the first that works: a Triton kernel, bitsandbytes' kernels, a table look-up.

All give the same bits: ``code[nibble] * absmax`` in fp32, rounded once to the wanted dtype.
"""

import functools
import logging
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Protocol

import torch
from torch.nn import functional

from ...memory import is_out_of_memory
from ..checkpoint.quant_state import (
    CODES,
    NESTED_BLOCKSIZE,
    NESTED_MAP,
    NestedAbsmax,
    NestedTables,
    QuantState,
)
from . import by_table, expanded_weight

logger = logging.getLogger(__name__)

_WITH_BLOCKWISE_KERNEL = ("cpu", "cuda", "xpu")
"""Types of device. On others bitsandbytes compiles its generic code, anew for each shape."""


_MOST_FUSED_ROWS, _LEAST_EXPANDED = 256, 4 << 20
"""With more rows of input, bitsandbytes 0.50 expands a weight of so many elements or more, on every GPU. Otherwise it
may multiply with the packed weight, which rounds otherwise."""


class Dequantise(Protocol):
    """Packed codes and fp32 absmax to a dense weight of ``state.shape`` and ``dtype`` on the same device."""

    def __call__(
        self, packed: torch.Tensor, absmax: torch.Tensor, state: QuantState, dtype: torch.dtype
    ) -> torch.Tensor: ...


def dequantise(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    state: QuantState,
    dtype: torch.dtype,
    tables: NestedTables | None = None,
) -> torch.Tensor:
    """Expand a 4-bit weight.

    Args:
        packed: uint8, ((out * in + 1) // 2,); two codes a byte, the first in the high nibble.
        absmax: (ceil(out * in / blocksize),): fp32, or uint8 if ``tables`` are given, which it is expanded with.
        state: Logical shape (out, in), blocksize and code table.
        dtype: fp32, fp16 or bf16.

    Returns:
        A fresh tensor of the logical shape and ``dtype`` on the device of ``packed``.
    """
    if _by_triton(state, dtype, packed.device):
        if tables is not None and not expanded_weight.takes_nested(state.nested):
            absmax, tables = fp32_absmax(state, absmax, tables), None
        return expanded_weight.expand(packed, absmax, state, dtype, tables)
    run: Dequantise = _dequantise_by_bitsandbytes if _has_kernels(packed.device) else by_table.dequantise
    return run(packed, fp32_absmax(state, absmax, tables), state, dtype)


def dequantise_rows(
    packed: torch.Tensor, absmax: torch.Tensor, state: QuantState, dtype: torch.dtype, start: int, end: int
) -> torch.Tensor:
    """Expand rows ``start`` to ``end`` of a 4-bit weight: as `dequantise`, (end - start, in).

    Each row has to begin a block of absmax: ``in`` is a multiple of the blocksize.
    """
    columns = state.shape[1]
    codes, scales = columns // 2, columns // state.blocksize
    rows = replace(state, shape=(end - start, columns))
    return dequantise(packed[start * codes : end * codes], absmax[start * scales : end * scales], rows, dtype)


def fp32_absmax(state: QuantState, absmax: torch.Tensor, tables: NestedTables | None) -> torch.Tensor:
    """The absmax of a weight in fp32, (ceil(out * in / blocksize),): ``absmax`` itself, or what it is expanded to.

    Args:
        state: If it says that absmax is nested, absmax is uint8, and ``tables`` are those of all its parts.
        absmax: On the same device as ``tables``.
        tables: None if absmax is not nested.
    """
    if tables is None:
        return absmax
    if len(state.nested) == 1:  # a forward comes by here 300 times, and this takes a third less of the host's time
        return expand_absmax(state.nested[0], absmax, tables)
    codes = absmax.split([part.count for part in state.nested])
    own = zip(state.nested, codes, tables.of_parts(state.nested), strict=True)
    return torch.cat([expand_absmax(*part) for part in own])


def expand_absmax(nested: NestedAbsmax, codes: torch.Tensor, tables: NestedTables) -> torch.Tensor:
    """Undo the second quantisation of absmax, on any device, bit-equal to what bitsandbytes does.

    Args:
        nested: How many codes, in blocks of how many.
        codes: uint8, (nested.count,).
        tables: Of one part, on the same device.

    Returns:
        A fresh tensor, fp32, (nested.count,).
    """
    if nested.blocksize == NESTED_BLOCKSIZE and _has_blockwise_kernel(codes.device):
        expanded = _map_blockwise(codes, tables)
    else:
        expanded = by_table.map_blockwise(codes, tables, nested.blocksize)
    return expanded.add_(tables.offset)


def has_gemm_4bit(device: torch.device) -> bool:
    """Whether `gemm_4bit` can be used. On the CPU its fused kernel rounds differently: it is not used there."""
    return device.type != "cpu" and _has_gemm_4bit(device)


def gemm_4bit(
    input: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    state: QuantState,
    bias: torch.Tensor | None,
    tables: NestedTables | None = None,
) -> torch.Tensor:
    """``input @ weight.T + bias`` with the bits of bitsandbytes (0.50 and later), in input's dtype.

    For few rows of input its kernel multiplies with the packed weight; for many it expands the weight and multiplies,
    which is done here if Triton expands faster.

    Args:
        packed: As in `dequantise`, like ``state``.
        absmax: fp32, or uint8 if ``tables`` are given, which it is expanded with.
    """
    rows = input.numel() // state.shape[1]
    if rows > _MOST_FUSED_ROWS and state.numel >= _LEAST_EXPANDED and _by_triton(state, input.dtype, packed.device):
        return functional.linear(input, dequantise(packed, absmax, state, input.dtype, tables), bias)
    nested = {}
    if tables is not None:
        as_written = len(state.nested) == 1 and state.nested[0].blocksize == NESTED_BLOCKSIZE
        if as_written and _has_blockwise_kernel(packed.device):
            # All in one call: to expand absmax before it takes the host a third longer.
            code, offset = tables.map.view(-1), tables.offset.view(())  # without dimensions: compiling asks for that
            nested = {"absmax_8bit": absmax, "absmax_code": code, "absmax_offset": offset}
            absmax = tables.absmax
        else:
            absmax = fp32_absmax(state, absmax, tables)
    product: torch.Tensor = torch.ops.bitsandbytes.gemm_4bit.default(
        input, packed.view(-1, 1), state.shape, absmax, state.blocksize, state.quant_type, bias=bias, **nested
    )
    return product


def warm_up(device: torch.device) -> None:
    """Import bitsandbytes and try all kernels, on any thread, so that the first forward need not wait: 0.75 s, and as
    long again when Triton compiles for the first time on a machine."""
    # The current device of a new thread is the first GPU.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), suppress(torch.OutOfMemoryError):
        _has_blockwise_kernel(device)
        for dtype in expanded_weight.DTYPES:
            _has_triton(device, dtype)


def _by_triton(state: QuantState, dtype: torch.dtype, device: torch.device) -> bool:
    return expanded_weight.takes(state, dtype) and _has_triton(device, dtype)


def _dequantise_by_bitsandbytes(
    packed: torch.Tensor, absmax: torch.Tensor, state: QuantState, dtype: torch.dtype
) -> torch.Tensor:
    shape, blocksize = state.shape, state.blocksize
    # The CPU kernel takes each row to begin a block, which is so only if ``in`` is a multiple of blocksize; large
    # blocks it leaves to torch.compile, which compiles anew for each shape.
    if packed.is_cpu and (shape[1] % blocksize or blocksize >= 2048):
        return by_table.dequantise(packed, absmax, state, dtype)
    return torch.ops.bitsandbytes.dequantize_4bit.default(packed, absmax, blocksize, state.quant_type, shape, dtype)


def _map_blockwise(codes: torch.Tensor, tables: NestedTables) -> torch.Tensor:
    mapped: torch.Tensor = torch.ops.bitsandbytes.dequantize_blockwise.default(
        codes, tables.absmax, tables.map, NESTED_BLOCKSIZE, torch.float32
    )
    return mapped


@functools.cache  # for each device: two GPUs of one machine need not be alike
def _dequantise_for(device: torch.device) -> Dequantise:
    problem = _bitsandbytes_problem(device)
    if problem is None:
        return _dequantise_by_bitsandbytes
    logger.warning(
        "NF4: no bitsandbytes kernel for %s (%s): what takes its place is exact but slower. "
        "For full speed: pip install 'bitsandbytes>=0.50' into ComfyUI's Python.",
        device,
        problem,
    )
    return by_table.dequantise


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # else the trial would be traced
def _has_triton(device: torch.device, dtype: torch.dtype) -> bool:
    return expanded_weight.works_on(device, dtype)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_kernels(device: torch.device) -> bool:
    return _dequantise_for(device) is _dequantise_by_bitsandbytes


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_gemm_4bit(device: torch.device) -> bool:
    return _has_kernels(device) and hasattr(torch.ops.bitsandbytes, "gemm_4bit")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_blockwise_kernel(device: torch.device) -> bool:
    return _has_kernels(device) and device.type in _WITH_BLOCKWISE_KERNEL and _maps_blockwise(device)


@functools.cache
def _maps_blockwise(device: torch.device) -> bool:
    """Whether bitsandbytes' kernel gives the right values. If not, nothing is logged: the table costs little more."""
    codes = torch.arange(300, device=device).to(torch.uint8)
    absmax, table = (torch.linspace(-1, 1, count, device=device) for count in (2, NESTED_MAP))
    tables = NestedTables(absmax, table, absmax[:1])
    try:
        return torch.equal(_map_blockwise(codes, tables), by_table.map_blockwise(codes, tables, NESTED_BLOCKSIZE))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return False


def _bitsandbytes_problem(device: torch.device) -> str | None:
    """Why bitsandbytes cannot be used on a device, or None.

    Importing it can fail in any way that a native library can fail, or succeed without a kernel for this device: so
    one small weight is tried and compared.
    """
    try:
        import bitsandbytes  # noqa: F401

        packed = torch.arange(256, dtype=torch.uint8, device=device)
        absmax = torch.linspace(0.01, 1, 8, device=device)
        for quant_type in CODES:
            weight = (packed, absmax, QuantState(quant_type, 64, (8, 64)), torch.float32)
            if not torch.equal(_dequantise_by_bitsandbytes(*weight), by_table.dequantise(*weight)):
                return f"its {quant_type} kernel gives other values than the format says"
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {error}"
    return None
