"""Slices of files into host memory, by several threads."""

import contextlib
import io
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import CheckpointError, reason

CHUNK_BYTES = 16 << 20
THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class FileSlice:
    """``destination.nbytes`` bytes of the file ``path`` from ``offset`` on, to be read into ``destination``.

    ``destination`` is a contiguous CPU tensor of any dtype; its bytes are overwritten. ``then`` is called once they
    have been read, by the thread that read them, while other threads go on; such a slice is read in one piece.
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
    chunks = sorted((chunk for item in slices for chunk in _chunks(item)), key=lambda chunk: chunk[:2])
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="nf4-read")
    try:
        for done in as_completed([pool.submit(_read_batch, batch) for batch in _batches(chunks)]):
            progress(done.result())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def read_small(slices: Sequence[FileSlice]) -> None:
    """`read_slices` for many small slices: on this thread, and each file is opened once.

    Raises:
        CheckpointError: a file ended early or could not be read.
    """
    for path, items in itertools.groupby(slices, key=lambda item: item.path):
        with opened(path) as file:
            for item in items:
                read_into(file, path, item.offset, _bytes_of(item.destination))


Chunk = tuple[Path, int, memoryview, Callable[[], None] | None]


def _chunks(item: FileSlice) -> list[Chunk]:
    view = _bytes_of(item.destination)
    size = max(view.nbytes, 1) if item.then else CHUNK_BYTES
    return [
        (item.path, item.offset + start, view[start : start + size], item.then) for start in range(0, view.nbytes, size)
    ]


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _batches(chunks: Sequence[Chunk]) -> Iterator[list[Chunk]]:
    """Neighbours in a file, as many as make up a whole chunk: a file has a thousand small tensors beside the large."""
    for _, of_file in itertools.groupby(chunks, key=lambda chunk: chunk[0]):
        batch: list[Chunk] = []
        nbytes = 0
        for chunk in of_file:
            if batch and nbytes + chunk[2].nbytes > CHUNK_BYTES:
                yield batch
                batch, nbytes = [], 0
            batch.append(chunk)
            nbytes += chunk[2].nbytes
        yield batch


def _read_batch(batch: Sequence[Chunk]) -> int:
    """The number of bytes that were read."""
    path = batch[0][0]
    with opened(path) as file:
        for _, offset, view, then in batch:
            read_into(file, path, offset, view)
            if then is not None:
                then()
    return sum(view.nbytes for _, _, view, _ in batch)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[io.FileIO]:
    """The file, to be read without a buffer.

    Raises:
        CheckpointError: it cannot be opened, or reading it inside the context fails.
    """
    try:
        with path.open("rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise CheckpointError(path, f"reading it failed ({reason(error)}). Check the disk, then try again.") from error


def read_into(file: io.FileIO, path: Path, offset: int, view: memoryview) -> None:
    """Fill ``view`` with the bytes of ``file`` from ``offset``, in as many reads as that takes.

    Raises:
        CheckpointError: the file ends before that.
    """
    done = 0
    file.seek(offset)
    while done < view.nbytes and (count := file.readinto(view[done:])):
        done += count
    if done < view.nbytes:
        raise CheckpointError(path, f"it ended at byte {offset + done:,} while it was read. Download it again.")
