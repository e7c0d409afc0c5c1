"""The host memory that holds every block's record: page aligned, one copy, pinned where the driver allows."""

import logging
import mmap
import weakref
from collections.abc import Sequence

import torch

logger = logging.getLogger(__name__)

PAGE = mmap.PAGESIZE


class HostArena:
    """One anonymous mapping with a record for each block, each on a page boundary.

    Memory is taken from the system page by page as it is first written, and goes back when the arena and all
    views of it are gone. After `pin`, copies from it to the device are asynchronous.
    """

    def __init__(self, record_bytes: Sequence[int]) -> None:
        starts = [0]
        for nbytes in record_bytes:
            starts.append(starts[-1] + -(-nbytes // PAGE) * PAGE)
        self.nbytes = starts[-1]
        self.pinned_bytes = 0
        # Private where the system knows the difference: shared anonymous memory gets no huge pages.
        flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        memory = mmap.mmap(-1, max(self.nbytes, PAGE), **flags)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        with torch.inference_mode(False):
            whole = torch.frombuffer(memory, dtype=torch.uint8)
            self.records = tuple(
                whole[start : start + nbytes] for start, nbytes in zip(starts, record_bytes, strict=False)
            )
        self._registered: list[int] = []
        # The finalizer holds the mapping: it is unregistered before its memory can go.
        weakref.finalize(self, _unregister, self._registered, memory)

    def pin(self, limit_bytes: int, device: torch.device) -> None:
        """Register the records with the driver of ``device``, in order, as far as it and ``limit_bytes`` allow.

        What is not pinned is copied through the driver's own staging: right, but slower. One log line says
        what was pinned and why not all. Calling it again does nothing.
        """
        if self._registered:
            return
        reason = ""
        for record in self.records:
            size = -(-record.nbytes // PAGE) * PAGE
            if self.pinned_bytes + size > limit_bytes:
                reason = f"the limit is {limit_bytes / 2**30:.2f} GiB"
                break
            error = int(torch.cuda.cudart().cudaHostRegister(record.data_ptr(), size, 0))
            if error:
                _clear_error(device)
                reason = f"the driver refused more (CUDA error {error})"
                break
            self._registered.append(record.data_ptr())
            self.pinned_bytes += size
        logger.info(
            "Streaming: %.2f of %.2f GiB of host memory pinned%s",
            self.pinned_bytes / 2**30,
            self.nbytes / 2**30,
            f"; {reason}, so some copies are slower" if reason else "",
        )


def _unregister(pointers: list[int], memory: mmap.mmap) -> None:
    if pointers:
        # A copy from these pages may still be under way.
        torch.cuda.synchronize()
    for pointer in pointers:
        torch.cuda.cudart().cudaHostUnregister(pointer)
    pointers.clear()


def _clear_error(device: torch.device) -> None:
    """A refused registration stays behind as the thread's last CUDA error and would be raised by the next launch."""
    try:
        torch.ones(1, device=device).add_(1)
        torch.cuda.synchronize()
    except RuntimeError:
        pass
