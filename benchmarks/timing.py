"""How long calls take, as the device sees it: no waiting between them."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


class Clock:
    """Moments on a device's compute stream; on the CPU, of the host."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._moments: list[Any] = []

    def tick(self) -> None:
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._moments.append(event)
        else:
            self._moments.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Between each tick and the next; waits for the device."""
        pairs = itertools.pairwise(self._moments)
        if not self._is_cuda:
            return [1000 * (after - before) for before, after in pairs]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in pairs]


def milliseconds(call: Callable[[], Any], repeats: int, device: torch.device | None = None) -> list[float]:
    """Time of each of ``repeats`` calls queued one after the other on ``device`` (default: CUDA's current one)."""
    clock = Clock(device or torch.device("cuda"))
    clock.tick()
    for _ in range(repeats):
        call()
        clock.tick()
    return clock.milliseconds()


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Time of one call on the host, until the device is done."""
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def least_disturbed(turns: Sequence[Sequence[float]]) -> float:
    """The median of the turn that has the lowest: what else runs on a machine slows turns, and speeds none up.

    It slows an H200's host to a half for seconds at a time, which a median over a few turns shows as a difference
    between two ways that run in turns. Chen and Revels, Robust benchmarking in noisy environments,
    https://arxiv.org/abs/1608.04295
    """
    return min(map(statistics.median, turns))


def copy_gbps(source: torch.Tensor, device: torch.device) -> float:
    """1e9 bytes a second at which ``source`` (host memory, pinned or not) is copied to ``device``; a median."""
    target = torch.empty_like(source, device=device)
    times = milliseconds(lambda: target.copy_(source, non_blocking=True), 20, device)
    return source.nbytes / statistics.median(times) / 1e6
