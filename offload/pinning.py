"""Page-locked (pinned) host memory, from which a device copies without the host: pinning it, and counting it."""

import logging
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..memory import GIB

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shortfall:
    """Why not everything is pinned, as a clause, and what to do about it, in sentences ("" if nothing can be done)."""

    reason: str
    advice: str


THE_LIMIT = Shortfall("that is the limit", "")


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
        self.registrars: dict[torch.device, Registrar] = {}
        self.read_only = read_only
        self._process = os.getpid()
        _all_pins.add(self)

    @property
    def nbytes(self) -> int:
        return sum(self.sizes.values())

    def register(self, registrar: Registrar, pointer: int, nbytes: int, *, tell: bool = True) -> int:
        """The driver's error code. Without ``tell``, somebody else has to call `pins_changed`."""
        error = registrar.register(pointer, nbytes, read_only=self.read_only)
        if not error:
            self.sizes[pointer] = nbytes
            if tell:
                pins_changed()
        return error

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


_REFUSAL_ADVICE = "Close other programs, or add RAM."
if sys.platform == "linux":
    _REFUSAL_ADVICE += " In a container, raise its limits on memory and locked memory (ulimit -l)."

_all_pins: weakref.WeakSet[Pins] = weakref.WeakSet()
"""The pins of all memory of this package: they share one limit."""


def _nobody() -> None:
    """Nobody wants to know."""


pins_changed: Callable[[], None] = _nobody
"""Called whenever `pinned_by_all` has changed. `comfyui.pins` puts its own function here."""


def pinned_by_all(*, read_only: bool = False) -> int:
    """Bytes that are pinned of all memory together; with ``read_only``, of files only."""
    return sum(pins.nbytes for pins in _all_pins if pins.read_only or not read_only)


class PinnableMemory:
    """Host memory in parts, one for each block, which are pinned one after the other. Empty parts are never pinned.

    ``pieces`` has the pieces of each part; parts may share a piece. ``what`` is the memory's name in the log.
    """

    def __init__(
        self,
        pieces: Sequence[Sequence[Piece]],
        registrar_for: Callable[[torch.device], Registrar | None],
        what: str,
    ) -> None:
        self.pieces = tuple(map(tuple, pieces))
        self._registrar_for = registrar_for
        self._what = what
        self._said = ""
        self._users = 0

    def keep_pinned_for(self, user: object) -> None:
        """Unpin when the last ``user`` has gone. Others may still hold the memory, but do not need it pinned."""
        self._users += 1
        weakref.finalize(user, self._let_go).atexit = False

    def _let_go(self) -> None:
        self._users -= 1
        if not self._users:
            self.unpin()

    def unpin(self) -> None:
        """Unregister what `pin` has registered, once no copy from it is under way. Idempotent."""
        for pins in {piece.pins for piece in self._in_order()}:
            pins.release()

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self._in_order())

    @property
    def pinned_bytes(self) -> int:
        return sum(piece.nbytes for piece in self._in_order() if piece.is_pinned)

    @property
    def all_pinned(self) -> bool:
        return all(piece.is_pinned for piece in self._in_order())

    def is_pinned(self, index: int) -> bool:
        """Whether all of part ``index`` is pinned."""
        return bool(self.pieces[index]) and all(piece.is_pinned for piece in self.pieces[index])

    def pin(
        self,
        limit_bytes: int,
        device: torch.device,
        limited_by: Shortfall = THE_LIMIT,
        first: Iterable[int] = (),
    ) -> None:
        """Pin the parts for copies to ``device``, beginning with ``first``, until all are pinned or one cannot be.

        Another call goes on from there. One log line says how much is pinned and why not everything, when that changes.

        Args:
            limit_bytes: How much memory this package may have pinned altogether.
            device: The device that is copied to.
            limited_by: What to say if ``limit_bytes`` is too little.
            first: Indices of parts.
        """
        self._say(self._pin_more(self._in_order(first), limit_bytes, device, limited_by))

    def _in_order(self, first: Iterable[int] = ()) -> Iterable[Piece]:
        order = dict.fromkeys((*first, *range(len(self.pieces))))
        return dict.fromkeys(piece for index in order for piece in self.pieces[index])

    def _pin_more(
        self, pieces: Iterable[Piece], limit_bytes: int, device: torch.device, limited_by: Shortfall
    ) -> Shortfall | None:
        registrar = self._registrar_for(device)
        if registrar is None:
            return Shortfall(f"{device.type} has no way to pin memory that is there already", "")
        for pins in {piece.pins for piece in pieces}:
            pins.registrars.setdefault(device, registrar)
        for piece in pieces:
            if piece.is_pinned:
                continue
            if pinned_by_all() + piece.nbytes > limit_bytes:
                return limited_by
            # Whatever makes the driver refuse one piece makes it refuse the others: the first refusal ends it.
            error = piece.pins.register(registrar, piece.pointer, piece.nbytes)
            if error:
                return Shortfall(f"the driver refused more (error {error})", _REFUSAL_ADVICE)
        return None

    def _say(self, shortfall: Shortfall | None) -> None:
        text = f"Streaming: {self.pinned_bytes / GIB:.2f} of {self.nbytes / GIB:.2f} GiB of {self._what} pinned"
        if shortfall is not None:
            text = f"{text}; {shortfall.reason}, so some copies are slower. {shortfall.advice}".rstrip()
        if text != self._said:
            can_be_helped = shortfall is not None and shortfall.advice
            logger.log(logging.WARNING if can_be_helped else logging.INFO, "%s", text)
        self._said = text
