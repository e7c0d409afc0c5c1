"""The Linears of Flux that kernels are measured on, and how: what `int8`, its trials and `expand_kernels` share."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from timing import milliseconds

SHAPES = {
    "qkv": (9216, 3072),
    "proj": (3072, 3072),
    "mlp.0": (12288, 3072),
    "mlp.2": (3072, 12288),
    "linear1": (21504, 3072),
    "linear2": (3072, 15360),
}
"""(out, in)."""

OF_EACH = 38
"""Flux has so many of each: 19 double blocks, one for the picture and one for the text; 38 single blocks."""

TEXT_TOKENS = 512
FASTER = "int8 where faster"

Packed = tuple[torch.Tensor, torch.Tensor, Any]
"""What `Linear4bit.packed_weight` gives."""


def layer_of(shape: tuple[int, int]) -> tuple[Any, torch.Tensor]:
    """A `Linear4bit` in NF4 with a bias, and the weight that it was made from, fp32."""
    from bitsandbytes import functional as bnb

    from flux_nf4.nf4_loader.checkpoint.quant_state import QuantState
    from flux_nf4.nf4_loader.linear.linear4bit import Linear4bit

    torch.manual_seed(0)
    full = torch.randn(shape, device="cuda") * 0.02
    packed, made = bnb.quantize_4bit(full.view(-1), blocksize=64, quant_type="nf4")
    state = QuantState("nf4", 64, shape)
    layer: Any = Linear4bit([state], bias=True, dtype=torch.bfloat16, device=full.device)
    layer.packed_0.copy_(packed.view(-1))
    layer.absmax_0.copy_(made.absmax)
    layer.bias.data.normal_()
    return layer, full


def by_bitsandbytes(packed: torch.Tensor, absmax: torch.Tensor, state: Any) -> torch.Tensor:
    """The weight that bitsandbytes expands, bf16."""
    dense: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        packed, absmax, state.blocksize, state.quant_type, state.shape, torch.bfloat16
    )
    return dense


def rows_of_pictures(name: str, pixels: list[int]) -> list[int]:
    """How many rows the input of layer ``name`` has for pictures of so many pixels a side."""
    tokens = [(side // 16) ** 2 for side in pixels]
    return [count + TEXT_TOKENS for count in tokens] if name.startswith("linear") else [TEXT_TOKENS, *tokens]


def device_ms(call: Callable[[], Any], repeats: int, ahead_cycles: int = 100_000_000) -> float:
    """Of one call on the device. The host is far ahead, however long it takes for a launch; a median."""
    call()
    torch.cuda.synchronize()
    torch.cuda._sleep(ahead_cycles)
    return statistics.median(milliseconds(call, repeats))


def host_us(call: Callable[[], Any], repeats: int = 60) -> float:
    """Of the thread, while the device is far behind; so few calls that none waits for room in the queue.

    The least of several turns: what else goes on in the host only adds to it.
    """
    call()
    times = []
    for _ in range(_TURNS_OF_HOST):
        torch.cuda.synchronize()
        torch.cuda._sleep(_BEHIND_CYCLES)
        started = time.thread_time()
        for _ in range(repeats):
            call()
        times.append(1e6 * (time.thread_time() - started) / repeats)
    return min(times)


_TURNS_OF_HOST, _BEHIND_CYCLES = 7, 200_000_000
"""The second: a tenth of a second."""


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())
