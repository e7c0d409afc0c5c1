"""How bytes get from host memory to the device: the only place that knows streams and events."""

import functools
import sys
import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Copies(Protocol):
    """Host-to-device copies that compute waits for on the device, never on the host.

    An event is whatever `event` returns; it starts out passed and may be recorded again and again.
    """

    device: torch.device

    def empty(self, nbytes: int) -> torch.Tensor:
        """Uninitialised bytes on the device, (nbytes,) uint8, given back when the tensor goes."""
        ...

    def event(self, *, timed: bool = False) -> Any:
        """A new event; a timed one tells when it passed."""
        ...

    def elapsed_ms(self, begun: Any, ended: Any) -> float | None:
        """Time between two timed events, or None while one of them has not passed."""
        ...

    def copy(
        self, destination: torch.Tensor, source: torch.Tensor, *, after: Any, done: Any, begun: Any = None
    ) -> None:
        """Once ``after`` has passed, copy ``source`` (host) to ``destination`` (device), then record ``done``.

        ``begun``, if given, is recorded just before the copy.
        """
        ...

    def compute_waits(self, event: Any) -> None:
        """What is launched for compute from here on runs after ``event``."""
        ...

    def record(self, event: Any) -> None:
        """``event`` passes when the compute launched so far is done."""
        ...


class StreamCopies:
    """Copies on a stream of their own, beside the compute stream that is current on the calling thread.

    One copy stream for each device, whoever streams: a bus has one direction to share.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # torch.cuda or torch.xpu: the same names in both.
        self._module: Any = getattr(torch, device.type)
        self._copy_stream = self._module.Stream(device)

    def empty(self, nbytes: int) -> torch.Tensor:
        memory = _empty(nbytes, self.device)
        # Whoever gets it next, even if this one's owner just vanishes, must not meet a copy that is under way.
        memory.record_stream(self._copy_stream)
        return memory

    def event(self, *, timed: bool = False) -> Any:
        return self._module.Event(enable_timing=timed)

    def elapsed_ms(self, begun: Any, ended: Any) -> float | None:
        return begun.elapsed_time(ended) if begun.query() and ended.query() else None

    def copy(
        self, destination: torch.Tensor, source: torch.Tensor, *, after: Any, done: Any, begun: Any = None
    ) -> None:
        self._copy_stream.wait_event(after)
        if begun is not None:
            begun.record(self._copy_stream)
        with self._module.stream(self._copy_stream):
            destination.copy_(source, non_blocking=True)
        done.record(self._copy_stream)
        if sys.platform == "win32":
            self._copy_stream.query()  # WDDM holds submissions back until something asks

    def compute_waits(self, event: Any) -> None:
        self._module.current_stream(self.device).wait_event(event)

    def record(self, event: Any) -> None:
        event.record(self._module.current_stream(self.device))

    def enter_thread(self) -> None:
        """Make a new thread work for this device, and for no other one by default."""
        self._module.set_device(self.device)

    def host_waits(self, event: Any) -> None:
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
        """Whether a copy from ``source`` (host) leaves the calling thread free."""
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

    def copy(
        self, destination: torch.Tensor, source: torch.Tensor, *, after: Any, done: Any, begun: Any = None
    ) -> None:
        if begun is not None:
            self.record(begun)
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
    has_streams = device.type in ("cuda", "xpu")
    return StreamCopies(device) if has_streams else InlineCopies(device)


def _empty(nbytes: int, device: torch.device) -> torch.Tensor:
    # An ordinary tensor: forwards may run in inference mode on one thread and outside it on another.
    with torch.inference_mode(False):
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
