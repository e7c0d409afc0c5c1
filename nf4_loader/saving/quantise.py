"""Dense weights to 4 bits, by bitsandbytes' own quantiser, and what it writes beside them."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoint.quant_state import NESTED_BLOCKSIZE, QuantType

_CHUNK = 1 << 20
"""Elements that a CPU quantises at once: whole blocks of any blocksize. They are few, so that bitsandbytes'
intermediates (some 16 bytes an element) stay in the cache, which is a third faster than all at once."""


@dataclass(frozen=True)
class QuantSettings:
    """How weights are quantised: absmax in fp32 (the files called v2), or nested (v1), which is smaller."""

    quant_type: QuantType = "nf4"
    nested: bool = False
    blocksize: int = 64


def quantise(weight: torch.Tensor, settings: QuantSettings) -> dict[str, torch.Tensor]:
    """Quantise one dense weight.

    Args:
        weight: (out, in), of any float dtype and device.
        settings: How.

    Returns:
        As `described`, in host memory; bit-equal to ``bitsandbytes.functional.quantize_4bit`` on that device.
    """
    from bitsandbytes import functional as bnb

    flat = weight.reshape(-1)
    packed = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(math.ceil(flat.numel() / settings.blocksize), dtype=torch.float32, device=weight.device)
    chunk = _CHUNK if weight.is_cpu else max(flat.numel(), 1)
    for start in range(0, flat.numel(), chunk):
        codes, state = bnb.quantize_4bit(
            flat[start : start + chunk], blocksize=settings.blocksize, quant_type=settings.quant_type
        )
        packed[start // 2 : start // 2 + codes.numel()] = codes.view(-1)
        first = start // settings.blocksize
        absmax[first : first + state.absmax.numel()] = state.absmax
    return described(packed, absmax, (weight.shape[0], weight.shape[1]), weight.dtype, settings)


def described(
    packed: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype, settings: QuantSettings
) -> dict[str, torch.Tensor]:
    """The tensors that bitsandbytes saves for a 4-bit weight, by the ends of their names: "" for the packed bytes.

    Args:
        packed: uint8, ((out * in + 1) // 2,).
        absmax: fp32, (ceil(out * in / blocksize),); quantised once more where ``settings`` say nested.
        shape: The logical (out, in).
        dtype: Of the weight that was quantised. Other tools dequantise to it.
        settings: How it was quantised.
    """
    from bitsandbytes import functional as bnb

    fields: dict[str, Any] = {
        "blocksize": settings.blocksize,
        "quant_type": settings.quant_type,
        "code": bnb.get_4bit_type(settings.quant_type, device=packed.device),
        "dtype": dtype,
        "shape": torch.Size(shape),
    }
    if settings.nested:
        # The second stage of quantize_4bit(compress_statistics=True).
        offset = absmax.mean()
        codes, second = bnb.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCKSIZE)
        state = bnb.QuantState(absmax=codes, offset=offset, state2=second, **fields)
    else:
        state = bnb.QuantState(absmax=absmax, **fields)
    tensors = {"": packed.view(-1, 1)} | {f".{key}": value for key, value in state.as_dict(packed=True).items()}
    return {end: tensor.cpu() for end, tensor in tensors.items()}
