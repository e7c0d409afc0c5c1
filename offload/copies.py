"""How bytes get from host memory to the device: the only place that knows streams and events."""

import functools
import sys
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

    def event(self) -> Any: ...

    def copy(self, destination: torch.Tensor, source: torch.Tensor, *, after: Any, done: Any) -> None:
        """Once ``after`` has passed, copy ``source`` (host) to ``destination`` (device), then record ``done``."""
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
        return _empty(nbytes, self.device)

    def event(self) -> Any:
        return self._module.Event()

    def copy(self, destination: torch.Tensor, source: torch.Tensor, *, after: Any, done: Any) -> None:
        self._copy_stream.wait_event(after)
        with self._module.stream(self._copy_stream):
            destination.copy_(source, non_blocking=True)
        done.record(self._copy_stream)
        if sys.platform == "win32":
            self._copy_stream.query()  # WDDM holds submissions back until something asks

    def compute_waits(self, event: Any) -> None:
        self._module.current_stream(self.device).wait_event(event)

    def record(self, event: Any) -> None:
        event.record(self._module.current_stream(self.device))


class InlineCopies:
    """Copies in program order, for devices without streams."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def empty(self, nbytes: int) -> torch.Tensor:
        return _empty(nbytes, self.device)

    def event(self) -> Any:
        return None

    def copy(self, destination: torch.Tensor, source: torch.Tensor, *, after: Any, done: Any) -> None:
        destination.copy_(source)

    def compute_waits(self, event: Any) -> None:
        pass

    def record(self, event: Any) -> None:
        pass


@functools.cache
def copies_to(device: torch.device) -> Copies:
    """The best kind of copies that ``device`` (with its index) can do."""
    has_streams = device.type in ("cuda", "xpu")
    return StreamCopies(device) if has_streams else InlineCopies(device)


def _empty(nbytes: int, device: torch.device) -> torch.Tensor:
    # An ordinary tensor: forwards may run in inference mode on one thread and outside it on another.
    with torch.inference_mode(False):
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
