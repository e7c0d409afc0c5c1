"""How bytes get from host memory to the device: the only place that knows streams and events."""

import functools
import logging
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

logger = logging.getLogger(__name__)

Pairs = Iterable[tuple[torch.Tensor, torch.Tensor]]
"""Pairs of a destination on the device and a source in host memory, flat uint8 of equal size."""


class Copies(Protocol):
    """Host-to-device copies that compute waits for on the device, never on the host.

    An event is whatever `event` returns; it starts out passed and may be recorded again and again.
    """

    device: torch.device

    def empty(self, nbytes: int) -> torch.Tensor:
        """Uninitialised bytes on the device, (nbytes,) uint8.

        When the tensor goes they are free for compute that is launched later, once no copy is under way to them.
        """
        ...

    def event(self, *, timed: bool = False) -> Any:
        """A new event; a timed one tells when it passed."""
        ...

    def elapsed_ms(self, begun: Any, ended: Any) -> float | None:
        """Time between two timed events that were recorded, or None while one of them has not passed."""
        ...

    def copy(self, pairs: Pairs, *, after: Any, done: Any, begun: Any = None) -> None:
        """Once ``after`` has passed, copy each source of ``pairs`` to its destination, then record ``done``.

        ``begun``, if given, is recorded just before the first copy.
        """
        ...

    def compute_waits(self, event: Any) -> None:
        """Have all compute launched from here on run after ``event``."""
        ...

    def record(self, event: Any) -> None:
        """``event`` passes when the compute launched so far is done."""
        ...


class StreamCopies:
    """Copies on a stream of their own, beside the compute stream that is current on the calling thread.

    One copy stream for each device, whoever streams: a bus has one direction to share. Streams and events are torch's
    device-neutral ones: their calls take a microsecond, where those of ``torch.cuda`` take ten.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._index = device.index
        self._copy_stream = torch.Stream(device)

    def empty(self, nbytes: int) -> torch.Tensor:
        memory = _empty(nbytes, self.device)
        memory.record_stream(self._copy_stream)
        return memory

    def event(self, *, timed: bool = False) -> torch.Event:
        return torch.Event(self.device, enable_timing=timed)

    def elapsed_ms(self, begun: torch.Event, ended: torch.Event) -> float | None:
        return begun.elapsed_time(ended) if begun.query() and ended.query() else None

    def copy(self, pairs: Pairs, *, after: Any, done: Any, begun: Any = None) -> None:
        stream, compute = self._copy_stream, torch.accelerator.current_stream(self._index)
        callers = torch.accelerator.current_stream()
        stream.wait_event(after)
        if begun is not None:
            begun.record(stream)
        torch.accelerator.set_stream(stream)
        try:
            for destination, source in pairs:
                destination.copy_(source, non_blocking=True)
        finally:
            torch.accelerator.set_stream(compute)
            if callers.device != compute.device:  # which has become the current one
                torch.accelerator.set_stream(callers)
        done.record(stream)
        if sys.platform == "win32":
            stream.query()  # WDDM holds submissions back until something asks

    def compute_waits(self, event: torch.Event) -> None:
        torch.accelerator.current_stream(self._index).wait_event(event)

    def record(self, event: torch.Event) -> None:
        event.record(torch.accelerator.current_stream(self._index))

    def enter_thread(self) -> None:
        """Make a new thread work for this device, and for no other one by default."""
        getattr(torch, self.device.type).set_device(self.device)

    def host_waits(self, event: torch.Event) -> None:
        """Return when ``event`` has passed."""
        event.synchronize()

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Uninitialised page-locked host memory, (nbytes,) uint8.

        Raises:
            RuntimeError: the driver refuses.
        """
        with torch.inference_mode(False):
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def is_pinned(self, source: torch.Tensor) -> bool:
        """Whether a copy from ``source`` (host) leaves the calling thread free. Torch looks at its storage's start."""
        return source.is_pinned()


class InlineCopies:
    """Copies in program order, for devices without streams."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def empty(self, nbytes: int) -> torch.Tensor:
        return _empty(nbytes, self.device)

    def event(self, *, timed: bool = False) -> "_Moment":
        return _Moment()

    def elapsed_ms(self, begun: "_Moment", ended: "_Moment") -> float | None:
        return 1000 * (ended.seconds - begun.seconds)

    def copy(self, pairs: Pairs, *, after: Any, done: Any, begun: Any = None) -> None:
        if begun is not None:
            self.record(begun)
        for destination, source in pairs:
            destination.copy_(source)
        self.record(done)

    def compute_waits(self, event: "_Moment") -> None:
        pass

    def record(self, event: "_Moment") -> None:
        event.seconds = time.perf_counter()


@dataclass
class _Moment:
    seconds: float = 0.0


@functools.cache
def copies_to(device: torch.device) -> Copies:
    """The best kind of copies that ``device`` (with its index) can do."""
    if device.type not in ("cuda", "xpu"):
        return InlineCopies(device)
    if not hasattr(torch, "accelerator"):
        logger.warning(
            "Streaming: torch %s has no torch.accelerator: copies hold up the computation. Use torch 2.6 or later.",
            torch.__version__,
        )
        return InlineCopies(device)
    return StreamCopies(device)


def _empty(nbytes: int, device: torch.device) -> torch.Tensor:
    # An ordinary tensor: forwards may run in inference mode on one thread and outside it on another.
    with torch.inference_mode(False):
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
