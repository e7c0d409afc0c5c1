"""4-bit weights and their absmax expanded by looking values up in plain torch, for any device.

All other ways are compared with this one: ``code[nibble] * absmax`` in fp32, rounded once to the wanted dtype.
"""

import functools

import torch

from ..checkpoint.quant_state import CODES, NestedTables, QuantState, QuantType

_CHUNK_BYTES = 1 << 22
"""Packed bytes that the table look-up expands at once. They are whole blocks of any blocksize."""


@functools.cache
def code_table(quant_type: QuantType, device: torch.device) -> torch.Tensor:
    """The sixteen values of a code, fp32 (16,)."""
    # Kept for each device: making it copies from the host, which makes the host wait.
    with torch.inference_mode(False):
        return torch.tensor(CODES[quant_type], dtype=torch.float32, device=device)


def dequantise(packed: torch.Tensor, absmax: torch.Tensor, state: QuantState, dtype: torch.dtype) -> torch.Tensor:
    """As `kernels.dequantise`; in chunks, so that the fp32 intermediate stays small."""
    numel, blocksize = state.numel, state.blocksize
    code = code_table(state.quant_type, packed.device)
    out = torch.empty(numel, dtype=dtype, device=packed.device)
    for start in range(0, packed.numel(), _CHUNK_BYTES):
        chunk = packed[start : start + _CHUNK_BYTES]
        nibbles = torch.stack((chunk >> 4, chunk & 15), dim=1).flatten()
        first = 2 * start
        last = min(first + nibbles.numel(), numel)
        scales = absmax[first // blocksize : -(-last // blocksize)].repeat_interleave(blocksize)
        out[first:last] = code[nibbles[: last - first].int()] * scales[: last - first]
    return out.view(state.shape)


def map_blockwise(codes: torch.Tensor, tables: NestedTables, blocksize: int) -> torch.Tensor:
    """Nested absmax before its offset is added: as `kernels.expand_absmax`, whose ``codes`` are in these blocks."""
    return tables.map.view(-1)[codes.int()] * tables.absmax.repeat_interleave(blocksize)[: codes.numel()]
