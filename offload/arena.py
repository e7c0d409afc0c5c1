"""The host memory that holds every block's record: page aligned, one copy, pinned as far as it may be."""

import contextlib
import ctypes
import mmap
import weakref
from collections.abc import Callable, Sequence

import torch

from ..memory import MIB
from .pinnable import PinnableMemory
from .pinning import Piece, Pins, Registrar, registrar_for

PAGE = mmap.PAGESIZE

PIECE_BYTES = 32 * MIB
"""Records are registered together until they have as many bytes: while a thread registers a file, each call to the
driver waits for the thread's present one."""


class HostArena(PinnableMemory):
    """One anonymous mapping with a record for each block, each on a page boundary.

    The system gives its memory page by page as it is first written, and gets it back, unregistered, when the arena and
    all views of it are gone: who holds a view, as a copy under way does, need not care. Copies from what `pin` has
    pinned are asynchronous.
    """

    def __init__(
        self,
        record_bytes: Sequence[int],
        registrar_for: Callable[[torch.device], Registrar | None] = registrar_for,
        what: str = "host memory",
    ) -> None:
        starts = [0]
        for nbytes in record_bytes:
            starts.append(starts[-1] + whole_pages(nbytes))
        self._pins = Pins()
        memory = _map(max(starts[-1], PAGE), self._pins.release)
        with torch.inference_mode(False):
            # Each with a storage of its own: torch takes a tensor to be pinned if its storage's first byte is.
            self.records = tuple(
                torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=start)
                if nbytes
                else torch.empty(0, dtype=torch.uint8)
                for start, nbytes in zip(starts, record_bytes, strict=False)
            )
        super().__init__(self._pieces(), registrar_for, what)

    def _pieces(self) -> list[list[Piece]]:
        pieces: list[list[Piece]] = [[] for _ in self.records]
        together: list[int] = []
        for index, record in enumerate(self.records):
            if record.nbytes:
                together.append(index)
            nbytes = sum(whole_pages(self.records[i].nbytes) for i in together)
            if together and (nbytes >= PIECE_BYTES or index == len(self.records) - 1):
                piece = Piece(self._pins, self.records[together[0]].data_ptr(), nbytes)
                for i in together:
                    pieces[i].append(piece)
                together = []
        return pieces


def whole_pages(nbytes: int) -> int:
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
