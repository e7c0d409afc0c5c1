"""Whether int8 is faster than the exact way to multiply: measured once for each device, shape and number of rows.

The answer is kept for the process, so it is the same for all layers and models, and after an interrupt: otherwise a
picture would depend on when it was made.
"""

import statistics
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional

from ...with_triton.trial import current
from ..checkpoint.quant_state import QuantState
from . import int8_weight, kernels, kitchen

_WORTH_IT = 1.05
"""How many times as fast int8 has to be. If it wins less than this, that is not worth its error."""

_MOST_OF_HOST = 0.5
"""The host may take so much of the device's time for int8. It has other things to launch: where it is what limits a
forward, less time on the device brings nothing, and int8 takes the host longer than exact."""

_LONG_MS, _ROUNDS, _CALLS = 2.0, 5, 5
"""A call that takes longer than this is timed alone. Shorter ones are timed in a row, because the host may take longer
for a call than the device."""


class Case(NamedTuple):
    """A weight of ``shape`` (out, in), and ``rows`` rows of input in ``dtype`` on ``device``."""

    shape: tuple[int, int]
    rows: int
    dtype: torch.dtype
    device: torch.device
    by_kernel: bool
    """Whether int8 rows are made by `int8_weight`, or else through a dense weight."""


class Timing(NamedTuple):
    """Milliseconds of one Linear: of several rounds the shortest of exact and the median of int8, so that noise does
    not speak for int8."""

    exact_ms: float
    int8_ms: float
    int8_host_ms: float = 0.0
    """What the host takes to launch int8."""

    @property
    def int8_is_faster(self) -> bool:
        return self.exact_ms > _WORTH_IT * self.int8_ms and self.int8_host_ms <= _MOST_OF_HOST * self.int8_ms


timings: dict[Case, Timing] = {}
"""Of this process, in the order in which they were measured."""

_measuring = threading.Lock()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # otherwise compiled code would measure
def int8_is_faster(
    shape: tuple[int, int], rows: int, dtype: torch.dtype, device: torch.device, by_kernel: bool
) -> bool:
    """Whether to multiply in int8 (arguments as in `Case`). The first call for a case measures it."""
    case = Case(shape, rows, dtype, device, by_kernel)
    timing = timings.get(case)  # in nearly all calls it is there
    if timing is None:
        if is_captured(device):
            return False  # nothing can be measured, and what is captured has run before
        timing = timing_of(case)
    return timing.int8_is_faster


def timing_of(case: Case) -> Timing:
    """How long both ways take. The first call for a case measures it."""
    with _measuring:
        timing = timings.get(case)
        if timing is None:
            timing = timings[case] = measure(case)
    return timing


def is_captured(device: torch.device) -> bool:
    """Whether launches now become a CUDA graph, which runs later, and again."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def measure(case: Case) -> Timing:
    """Time both ways on random weights. The device's own random numbers are left alone."""
    state = QuantState("nf4", 64, case.shape)
    device, dtype = case.device, case.dtype
    generator = torch.Generator(device).manual_seed(0)
    packed = torch.randint(256, (state.packed_bytes,), dtype=torch.uint8, device=device, generator=generator)
    absmax = torch.ones(state.absmax_count, device=device)
    input = torch.randn(case.rows, case.shape[1], dtype=dtype, device=device, generator=generator)
    bias = torch.zeros(case.shape[0], dtype=dtype, device=device)
    row_scale = torch.ones(case.shape[0], device=device)

    def exact() -> torch.Tensor:
        if kernels.has_gemm_4bit(device):
            return kernels.gemm_4bit(input, packed, absmax, state, bias)
        return functional.linear(input, kernels.dequantise(packed, absmax, state, dtype), bias)

    def int8() -> torch.Tensor:
        if not case.by_kernel:
            return kitchen.linear(input, *kitchen.quantise(kernels.dequantise(packed, absmax, state, dtype)), bias)
        rows = torch.empty(case.shape, dtype=torch.int8, device=device)
        int8_weight.write_int8_rows(packed, absmax, state, dtype, (), row_scale, rows, scales_are_known=True)
        return kitchen.linear(input, rows, row_scale, bias)

    with current(device):
        calls: dict[Callable[[], torch.Tensor], int] = {}
        for way in (exact, int8):
            way()  # compiles, allocates, chooses
            calls[way] = 1 if elapsed_ms(way, device)[0] > _LONG_MS else _CALLS
        times: dict[Callable[[], torch.Tensor], list[tuple[float, float]]] = {exact: [], int8: []}
        for _ in range(_ROUNDS):  # in turns, as clocks and copies beside this change
            for way, count in calls.items():
                times[way].append(elapsed_ms(way, device, count))
    int8_ms, int8_host_ms = map(statistics.median, zip(*times[int8], strict=True))
    return Timing(min(on_device for on_device, _ in times[exact]), int8_ms, int8_host_ms)


def elapsed_ms(call: Callable[[], object], device: torch.device, count: int = 1) -> tuple[float, float]:
    """Of one of ``count`` calls in a row on ``device``, which must be the current one: on the device, and on the host
    until it is launched. Waits for the device."""
    begun, ended = (torch.get_device_module(device.type).Event(enable_timing=True) for _ in range(2))
    begun.record()
    started = time.perf_counter()
    for _ in range(count):
        call()
    host_ms = 1000 * (time.perf_counter() - started)
    ended.record()
    ended.synchronize()
    return begun.elapsed_time(ended) / count, host_ms / count
