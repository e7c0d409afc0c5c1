"""The host memory that holds every block's record: page aligned, one copy, pinned as far as it may be."""

import contextlib
import ctypes
import logging
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..memory import GIB

logger = logging.getLogger(__name__)

PAGE = mmap.PAGESIZE


@dataclass(frozen=True)
class Shortfall:
    """Why not all is pinned, as a clause, and what to do about it, in sentences ("" if nothing can be done)."""

    reason: str
    advice: str


THE_LIMIT = Shortfall("that is the limit", "")


class Registrar(Protocol):
    """Page-locks host memory for a device."""

    def register(self, pointer: int, nbytes: int) -> int:
        """The driver's error code; 0 is success. A refusal leaves nothing behind, no pending error either."""
        ...

    def unregister(self, pointer: int) -> None: ...

    def synchronise(self) -> None:
        """Wait for every copy to the device."""
        ...


class CudaRegistrar:
    """cudaHostRegister, which locks exactly these bytes: `pin_memory` would copy and round up to a power of two."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def register(self, pointer: int, nbytes: int) -> int:
        with torch.cuda.device(self._device):
            error = int(torch.cuda.cudart().cudaHostRegister(pointer, nbytes, 0))
        if error:
            self._clear_error()
        return error

    def unregister(self, pointer: int) -> None:
        torch.cuda.cudart().cudaHostUnregister(pointer)

    def synchronise(self) -> None:
        torch.cuda.synchronize(self._device)

    def _clear_error(self) -> None:
        """A refusal stays behind as the thread's last CUDA error and would be raised by whoever launches next."""
        try:
            torch.ones(1, device=self._device).add_(1)
            self.synchronise()
        except RuntimeError:
            pass


def registrar_for(device: torch.device) -> Registrar | None:
    """What page-locks memory for ``device``; None where nothing does."""
    return CudaRegistrar(device) if device.type == "cuda" else None


class _Pins:
    """What of one arena's memory is registered, and with whom."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self.registrars: dict[torch.device, Registrar | None] = {}
        self._process = os.getpid()
        _all_pins.add(self)

    @property
    def nbytes(self) -> int:
        return sum(self.sizes.values())

    def register(self, registrar: Registrar, pointer: int, nbytes: int) -> int:
        error = registrar.register(pointer, nbytes)
        if not error:
            self.sizes[pointer] = nbytes
            pins_changed()
        return error

    def release(self) -> None:
        """Unregister everything. Idempotent; nothing in a fork, whose parent goes on using what it registered."""
        registrars = [registrar for registrar in self.registrars.values() if registrar is not None]
        sizes, self.sizes = self.sizes, {}
        if sizes and self._process == os.getpid():
            try:
                for registrar in registrars:
                    registrar.synchronise()  # a copy from these pages may still be under way
            finally:
                for pointer in sizes:
                    registrars[0].unregister(pointer)
                pins_changed()


_all_pins: weakref.WeakSet[_Pins] = weakref.WeakSet()
"""Of every arena whose memory is in use: they share one limit."""


def _nobody() -> None:
    """Nobody wants to know."""


pins_changed: Callable[[], None] = _nobody
"""Called whenever `pinned_by_all` has changed. ComfyUI's side puts its own function here."""


def pinned_by_all() -> int:
    """Bytes that all arenas together have pinned."""
    return sum(pins.nbytes for pins in _all_pins)


class HostArena:
    """One anonymous mapping with a record for each block, each on a page boundary.

    Memory is taken from the system page by page as it is first written, and goes back, unregistered, when the
    arena and all views of it are gone: who holds a view, as a copy under way does, need not care. Copies from what
    `pin` has pinned are asynchronous.
    """

    def __init__(
        self,
        record_bytes: Sequence[int],
        registrar_for: Callable[[torch.device], Registrar | None] = registrar_for,
        what: str = "host memory",
    ) -> None:
        starts = [0]
        for nbytes in record_bytes:
            starts.append(starts[-1] + _whole_pages(nbytes))
        self.nbytes = starts[-1]
        self._pins = _Pins()
        self._registrar_for = registrar_for
        self._what = what
        self._said = ""
        self._users = 0
        memory = _map(max(self.nbytes, PAGE), self._pins.release)
        with torch.inference_mode(False):
            # Each with a storage of its own: torch takes a tensor to be pinned if its storage's first byte is.
            self.records = tuple(
                torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=start)
                if nbytes
                else torch.empty(0, dtype=torch.uint8)
                for start, nbytes in zip(starts, record_bytes, strict=False)
            )

    @property
    def pinned_bytes(self) -> int:
        return self._pins.nbytes

    @property
    def all_pinned(self) -> bool:
        return self.pinned_bytes == self.nbytes

    def is_pinned(self, index: int) -> bool:
        """Whether record ``index`` is."""
        return self.records[index].data_ptr() in self._pins.sizes

    def pin(
        self,
        limit_bytes: int,
        device: torch.device,
        limited_by: Shortfall = THE_LIMIT,
        first: Iterable[int] = (),
    ) -> None:
        """Register the records with the driver of ``device``, ``first`` ones first, until all are or one may not be.

        Called again, it goes on from there. One log line says how much is pinned and why not all, when that changes.

        Args:
            limit_bytes: How much all arenas together may pin.
            device: The device that is copied to.
            limited_by: What to say where ``limit_bytes`` is too little.
            first: Indices of records.
        """
        order = dict.fromkeys((*first, *range(len(self.records))))
        self._say(self._pin_more(order, limit_bytes, device, limited_by))

    def keep_pinned_for(self, user: object) -> None:
        """Give back what is pinned when the last ``user`` has gone: others who hold the memory need no pinned pages."""
        self._users += 1
        weakref.finalize(user, self._let_go).atexit = False

    def _let_go(self) -> None:
        self._users -= 1
        if not self._users:
            self.unpin()

    def unpin(self) -> None:
        """Give back what `pin` has registered, once no copy from it is under way. Idempotent."""
        self._pins.release()

    def _pin_more(
        self, order: Iterable[int], limit_bytes: int, device: torch.device, limited_by: Shortfall
    ) -> Shortfall | None:
        if device not in self._pins.registrars:
            self._pins.registrars[device] = self._registrar_for(device)
        registrar = self._pins.registrars[device]
        if registrar is None:
            return Shortfall(f"{device.type} has no way to pin memory that is there already", "")
        for index in order:
            record = self.records[index]
            if self.is_pinned(index) or not record.nbytes:
                continue
            size = _whole_pages(record.nbytes)
            if pinned_by_all() + size > limit_bytes:
                return limited_by
            # Whatever makes the driver refuse one record makes it refuse the others: the first refusal ends it.
            error = self._pins.register(registrar, record.data_ptr(), size)
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


_REFUSAL_ADVICE = "Close other programs, or add RAM."
if sys.platform == "linux":
    _REFUSAL_ADVICE += " In a container, raise its limits on memory and locked memory (ulimit -l)."


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


def _map(nbytes: int, before_it_goes: Callable[[], None]) -> "ctypes.Array[ctypes.c_ubyte]":
    """Fresh memory from the system; ``before_it_goes`` is called when it and the last tensor on it are gone."""
    # Private where the system knows the difference: shared anonymous memory gets no huge pages.
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, nbytes, **flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages does not know the word
            memory.madvise(mmap.MADV_HUGEPAGE)
    # What every view holds; the mapping's own finalizers would run when it is unmapped already.
    holder = (ctypes.c_ubyte * nbytes).from_buffer(memory)
    weakref.finalize(holder, _release_mapping, before_it_goes, memory)
    return holder


def _release_mapping(before_it_goes: Callable[[], None], memory: mmap.mmap) -> None:
    """``memory`` is held by the finalizer until this is over."""
    before_it_goes()
