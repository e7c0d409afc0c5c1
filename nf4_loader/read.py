"""Slices of files into host memory, by several threads."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import CheckpointError

CHUNK_BYTES = 16 << 20
THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class FileSlice:
    """``destination.nbytes`` bytes of the file ``path`` from ``offset`` on, to be read into ``destination``.

    ``destination`` is a contiguous CPU tensor of any dtype; its bytes are overwritten. ``then`` is called when they
    are, by the thread that read them, while others go on; such a slice is read in one piece.
    """

    path: Path
    offset: int
    destination: torch.Tensor
    then: Callable[[], None] | None = None


def read_slices(slices: Sequence[FileSlice], progress: Callable[[int], None]) -> None:
    """Read every slice straight into its destination.

    Args:
        slices: What to read; destinations must not overlap.
        progress: Called on this thread with the number of bytes read since the last call. What it raises
            (ComfyUI's interrupt, say) ends the reading.

    Raises:
        CheckpointError: a file ended early or could not be read.
    """
    chunks = [chunk for item in slices for chunk in _chunks(item)]
    chunks.sort(key=lambda chunk: chunk[:2])
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="nf4-read")
    try:
        for done in as_completed([pool.submit(_read_chunk, *chunk) for chunk in chunks]):
            progress(done.result())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


Chunk = tuple[Path, int, memoryview, Callable[[], None] | None]


def _chunks(item: FileSlice) -> list[Chunk]:
    view = memoryview(item.destination.detach().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    size = max(view.nbytes, 1) if item.then else CHUNK_BYTES
    return [
        (item.path, item.offset + start, view[start : start + size], item.then) for start in range(0, view.nbytes, size)
    ]


def _read_chunk(path: Path, offset: int, view: memoryview, then: Callable[[], None] | None) -> int:
    done = 0
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            while done < view.nbytes and (count := file.readinto(view[done:])):
                done += count
    except OSError as error:
        raise CheckpointError(path, f"reading it failed ({error}). Check the disk, then try again.") from error
    if done < view.nbytes:
        raise CheckpointError(path, f"it ended at byte {offset + done:,} while it was read. Download it again.")
    if then is not None:
        then()
    return done
