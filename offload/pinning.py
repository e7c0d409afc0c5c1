"""Page-locked (pinned) host memory, from which a device copies without the host: registering it, and counting it."""

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch


class Registrar(Protocol):
    """Page-locks host memory for a device."""

    def register(self, pointer: int, nbytes: int, *, read_only: bool = False) -> int:
        """Returns the driver's error code; 0 is success. A refusal leaves nothing behind, not even a pending error.

        ``read_only``: the device will only read, and the memory may be a file's map, which the driver refuses
        otherwise.
        """
        ...

    def unregister(self, pointer: int) -> None: ...

    def synchronise(self) -> None:
        """Wait for every copy to the device."""
        ...


READ_ONLY = 8
"""cudaHostRegisterReadOnly."""

NOT_SUPPORTED = 801
"""cudaErrorNotSupported: what a device without the attribute HostRegisterReadOnlySupported answers to `READ_ONLY`."""


class CudaRegistrar:
    """cudaHostRegister, which locks exactly these bytes: `pin_memory` would copy and round up to a power of two."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def register(self, pointer: int, nbytes: int, *, read_only: bool = False) -> int:
        if read_only and torch.version.hip is not None:
            return NOT_SUPPORTED  # the same number is another flag there
        with torch.cuda.device(self._device):
            error = int(torch.cuda.cudart().cudaHostRegister(pointer, nbytes, READ_ONLY if read_only else 0))
        if error:
            self._clear_error()
        return error

    def unregister(self, pointer: int) -> None:
        torch.cuda.cudart().cudaHostUnregister(pointer)

    def synchronise(self) -> None:
        torch.cuda.synchronize(self._device)

    def _clear_error(self) -> None:
        """Clear the thread's last CUDA error: after a refusal, the next launch would raise it."""
        try:
            torch.ones(1, device=self._device).add_(1)
            self.synchronise()
        except RuntimeError:
            pass


REGISTRARS: dict[str, Callable[[torch.device], Registrar]] = {"cuda": CudaRegistrar}
"""By the type of a device."""


def registrar_for(device: torch.device) -> Registrar | None:
    """The registrar for ``device``; None if there is none for its type."""
    make = REGISTRARS.get(device.type)
    return make(device) if make is not None else None


class Pins:
    """The registered parts of one mapping, and the registrars of the devices that copy from it."""

    def __init__(self, *, read_only: bool = False) -> None:
        self.sizes: dict[int, int] = {}
        """Bytes by address. What `pinning_ahead` is still to register counts, too."""
        self.registrars: dict[torch.device, Registrar] = {}
        self.read_only = read_only
        self._process = os.getpid()
        _all_pins.add(self)

    @property
    def nbytes(self) -> int:
        return sum(self.sizes.values())

    def release(self) -> None:
        """Unregister everything. Idempotent. In a forked process it does nothing: the parent still uses the memory."""
        registrars = list(self.registrars.values())
        sizes, self.sizes = self.sizes, {}
        if sizes and self._process == os.getpid():
            try:
                for registrar in registrars:
                    registrar.synchronise()  # a copy from these pages may still be under way
            finally:
                for pointer in sizes:
                    registrars[0].unregister(pointer)
                pins_changed()


@dataclass(frozen=True)
class Piece:
    """Whole pages that are registered as one. ``pins`` are of the mapping that they belong to."""

    pins: Pins
    pointer: int
    nbytes: int

    @property
    def is_pinned(self) -> bool:
        return self.pointer in self.pins.sizes

    def register(self, registrar: Registrar) -> int:
        """The driver's error code; 0 is success. Whoever has registered the last piece calls `pins_changed`."""
        error = registrar.register(self.pointer, self.nbytes, read_only=self.pins.read_only)
        if not error:
            self.count()
        return error

    def count(self) -> None:
        """Count it as pinned."""
        self.pins.sizes[self.pointer] = self.nbytes

    def discount(self) -> None:
        """It is not pinned after all. Idempotent."""
        self.pins.sizes.pop(self.pointer, None)


_all_pins: weakref.WeakSet[Pins] = weakref.WeakSet()
"""The pins of all memory of this package: they share one limit."""


def _nobody() -> None:
    """Nobody wants to know."""


pins_changed: Callable[[], None] = _nobody
"""Called when `pinned_by_all` has changed; after a refusal on the thread of `pinning_ahead`, by whoever pins or waits
next. `comfyui.pins` puts its own function here."""


def pinned_by_all(*, read_only: bool = False) -> int:
    """Bytes that are pinned of all memory together; with ``read_only``, of files only."""
    while True:
        try:
            every = list(_all_pins)
        except RuntimeError:  # another thread has just made some
            continue
        return sum(pins.nbytes for pins in every if pins.read_only or not read_only)


def refused(error: int) -> str:
    """The clause for a driver's error code."""
    return f"the driver refused more (error {error})"
