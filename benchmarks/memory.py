"""Memory of the device and of this process: how much is used at most, and a device made smaller."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

GIB = 2**30
CONTEXT_GIB = 0.5
"""About what a CUDA context takes of a card; it is there already when a cap is set."""


@dataclass(frozen=True)
class Use:
    """Bytes in use: of the whole device, by all processes and with their contexts, and of torch's allocator here."""

    device: int = 0
    allocated: int = 0

    @classmethod
    def at_rest(cls, device: torch.device) -> "Use":
        """Without what torch's allocator holds and no tensor uses."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        return cls.now(device)

    @classmethod
    def now(cls, device: torch.device) -> "Use":
        if device.type != "cuda":
            return cls()
        free, total = torch.cuda.mem_get_info(device)
        return cls(total - free, torch.cuda.memory_allocated(device))


class Watch:
    """What is used at most of ``device`` within a ``with`` statement, above what was used ``before``.

    A thread asks the device ``every_s`` seconds: between two samples its figure may miss a moment; torch's own misses
    none. A thread that asks often slows launches down: not for calls that are timed.
    """

    def __init__(self, device: torch.device, before: Use, every_s: float = 0.001) -> None:
        self.peak = Use()
        self._device, self._before, self._every_s = device, before, every_s
        self._over = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Watch":
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self._over.set()
            self._sampler.join()
            allocated = torch.cuda.max_memory_allocated(self._device) - self._before.allocated
            self.peak = Use(self.peak.device - self._before.device, allocated)

    def _sample(self) -> None:
        # Not torch's own figures: asking for them needs the lock of its allocator while this thread has Python's, and
        # with dynamic VRAM the allocator calls into Python.
        while not self._over.wait(self._every_s):
            free, total = torch.cuda.mem_get_info(self._device)
            if total - free > self.peak.device:
                self.peak = Use(total - free)


@contextmanager
def capped(device: torch.device, gib: float) -> Iterator[int]:
    """Leave of ``device`` what a card of ``gib`` has beside a CUDA context; gives the bytes that this takes away.

    The rest is really allocated: every allocator meets the same limit, and ``mem_get_info`` tells it. Only the total
    stays that of the real card, which ComfyUI looks at for little more than its log.
    """
    if not gib:
        yield 0
        return
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    ballast_bytes = free - int((gib - CONTEXT_GIB) * GIB)
    if ballast_bytes < 0:
        raise ValueError(f"a cap of {gib} GiB: the device has only {free / GIB:.2f} GiB free")
    ballast = torch.empty(ballast_bytes, dtype=torch.uint8, device=device)
    try:
        yield ballast.nbytes
    finally:
        del ballast
        torch.cuda.empty_cache()


def resident_bytes(field: str = "VmRSS") -> int:
    """Host memory of this process now (``VmRSS``) or at most so far (``VmHWM``). Linux only; 0 elsewhere."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)
