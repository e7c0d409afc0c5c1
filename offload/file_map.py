"""Files as host memory: mapped, not read, so that all who use a file, in any process, share the system's copy of it.

What belongs together, as the tensors of a block do, is mapped as one range. Each range has memory of its own: two of
them may share a page of the file, but a page of memory must not be registered with a driver twice.
"""

import ctypes
import errno
import mmap
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol

import torch

from .pinning import Pins

_GAP_BYTES = 1 << 20
"""Parts of a file that are this close to each other are mapped as one range, with what is between them."""

_CHUNK_BYTES = 16 << 20
_THREADS = min(8, os.cpu_count() or 1)

_POPULATE_READ = 22
"""MADV_POPULATE_READ, of Linux 5.14 and later: https://man7.org/linux/man-pages/man2/madvise.2.html"""


class FileMapError(Exception):
    """A file that cannot be used as memory, or not any more. The message starts with its name."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path.name}: {problem}")
        self.path = path
        self.problem = problem


class FilePart(Protocol):
    """Consecutive bytes of a file."""

    @property
    def path(self) -> Path: ...

    @property
    def offset(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


Identity = tuple[int, int, int, int]
"""Device, inode, time of change in ns and size of a file."""


class MappedFile:
    """A file that is kept open as long as some of it is mapped: a file that takes its name is another one."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor
        self.ranges: weakref.WeakValueDictionary[tuple[int, int], Any] = weakref.WeakValueDictionary()
        self._identity = _identity(descriptor)
        weakref.finalize(self, os.close, descriptor)

    @property
    def nbytes(self) -> int:
        return self._identity[-1]

    def require_unchanged(self) -> None:
        """Raises `FileMapError` where somebody has written to the file, so that it holds other weights, or none."""
        if _identity(self.descriptor) != self._identity:
            raise FileMapError(
                self.path,
                "it was written to while it was in use. Load it again; to replace a file that is in use, write the "
                "new one under another name, then rename it.",
            )


class MappedRange:
    """Bytes of a file in memory that may only be read.

    It is there as long as a tensor on its memory is: then it is unregistered, and the map goes. ``users`` are those for
    whom it is pinned.
    """

    def __init__(self, file: MappedFile, offset: int, address: int, nbytes: int) -> None:
        self.file = file
        self.offset = offset
        self.address = address
        self.nbytes = nbytes
        self.pins = Pins(read_only=True)
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()


_files: weakref.WeakValueDictionary[Identity, MappedFile] = weakref.WeakValueDictionary()
_ranges: dict[int, MappedRange] = {}
"""Every range that is mapped, by the address of its memory."""


def map_parts(parts: Sequence[FilePart]) -> list[torch.Tensor]:
    """Each of ``parts``, which are used together, as a tensor (uint8, flat) on the file's memory: not to be written to.

    Raises:
        FileMapError: a file cannot be opened or mapped, or is shorter than a part says.
    """
    tensors: dict[int, torch.Tensor] = {}
    for group in _close_together(parts):
        start, end = parts[group[0]].offset, max(parts[i].offset + parts[i].nbytes for i in group)
        start -= start % mmap.ALLOCATIONGRANULARITY
        memory = _memory(_opened(parts[group[0]].path), start, end - start)
        for i in group:
            tensors[i] = memory[parts[i].offset - start :][: parts[i].nbytes]
    return [tensors[i] for i in range(len(parts))]


def range_of(tensor: torch.Tensor) -> MappedRange:
    """What a tensor of `map_parts`, or a view of one, is in."""
    return _ranges[tensor.untyped_storage().data_ptr()]


def bring_in(ranges: Iterable[MappedRange], progress: Callable[[int], None]) -> None:
    """Have the system read what it has not of ``ranges``, in file order, by several threads, and map all of it.

    ``progress`` is called on this thread with the number of bytes since the last call. What it raises (ComfyUI's
    interrupt, say) ends it.

    Raises:
        FileMapError: a file was cut short meanwhile, or could not be read.
    """
    chunks = [
        (item, start, min(_CHUNK_BYTES, item.nbytes - start))
        for item in sorted(ranges, key=lambda item: (item.file.path, item.offset))
        for start in range(0, item.nbytes, _CHUNK_BYTES)
    ]
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="file-map")
    try:
        for done in as_completed([pool.submit(_bring_in, *chunk) for chunk in chunks]):
            progress(done.result())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _close_together(parts: Sequence[FilePart]) -> Iterable[list[int]]:
    """Indices of ``parts``, in groups that are each close together in one file."""
    group: list[int] = []
    end = 0
    for i in sorted(range(len(parts)), key=lambda i: (parts[i].path, parts[i].offset)):
        if group and (parts[i].path != parts[group[0]].path or parts[i].offset > end + _GAP_BYTES):
            yield group
            group = []
        end = max(end if group else 0, parts[i].offset + parts[i].nbytes)
        group.append(i)
    if group:
        yield group


def _opened(path: Path) -> MappedFile:
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise FileMapError(path, f"it cannot be opened ({error}). Check the disk, then try again.") from error
    identity = _identity(descriptor)
    file = _files.get(identity)
    if file is not None:
        os.close(descriptor)
        return file
    file = _files[identity] = MappedFile(path, descriptor)
    return file


def _identity(descriptor: int) -> Identity:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def _memory(file: MappedFile, start: int, nbytes: int) -> torch.Tensor:
    """Bytes of ``file`` from ``start``, where a page begins, on; the same memory for all who ask while it is there."""
    if start + nbytes > file.nbytes:
        raise FileMapError(file.path, f"it ends at byte {file.nbytes:,}, before {start + nbytes:,}. Download it again.")
    holder = file.ranges.get((start, nbytes))
    if holder is None:
        try:
            holder = _map(file.descriptor, start, nbytes)
        except (OSError, ValueError) as error:
            raise FileMapError(
                file.path, f"it cannot be mapped into memory ({error}). Close other programs."
            ) from error
        file.ranges[start, nbytes] = holder
    with torch.inference_mode(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # and nobody writes to it
        memory = torch.frombuffer(holder, dtype=torch.uint8)
    address = memory.data_ptr()
    if address not in _ranges:
        _ranges[address] = MappedRange(file, start, address, nbytes)
        weakref.finalize(holder, _unmap, _ranges[address])
    return memory


def _unmap(item: MappedRange) -> None:
    del _ranges[item.address]
    item.pins.release()
    if _libc is not None:
        _libc.munmap(item.address, item.nbytes)


def _map(descriptor: int, start: int, nbytes: int) -> Any:
    """What torch makes a tensor of.

    Shared: a private map may be written to, so a system without as much memory refuses it, and pages of one that are
    registered are copied.
    """
    if _libc is None:
        return mmap.mmap(descriptor, nbytes, access=mmap.ACCESS_READ, offset=start)
    # Python's own map keeps the file open once more for each range, and holds up all threads where it reads.
    address = _libc.mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, start)
    if address == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return (ctypes.c_ubyte * nbytes).from_address(address)


_MAP_FAILED = ctypes.c_void_p(-1).value


def _load_libc() -> ctypes.CDLL | None:
    """The system's C library where it maps files as POSIX says."""
    if os.name != "posix":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    size, offset = ctypes.c_size_t, ctypes.c_int64
    libc.mmap.argtypes = (ctypes.c_void_p, size, ctypes.c_int, ctypes.c_int, ctypes.c_int, offset)
    libc.mmap.restype = ctypes.c_void_p
    libc.munmap.argtypes = (ctypes.c_void_p, size)
    libc.madvise.argtypes = (ctypes.c_void_p, size, ctypes.c_int)
    return libc


_libc = _load_libc()


def _bring_in(item: MappedRange, start: int, nbytes: int) -> int:
    file = item.file
    if hasattr(os, "posix_fadvise"):  # all of it is asked for before the first page is waited for
        os.posix_fadvise(file.descriptor, item.offset + start, nbytes, os.POSIX_FADV_WILLNEED)
    problem = _populate(item.address + start, nbytes)
    if problem == errno.EINVAL:
        _read(file, item.offset + start, nbytes)
    elif problem:
        file.require_unchanged()
        raise FileMapError(file.path, f"reading it failed ({os.strerror(problem)}). Check the disk, then try again.")
    return nbytes


def _populate(address: int, nbytes: int) -> int:
    """The error number of the system; EINVAL where it does not know what it is asked for."""
    if _libc is None:
        return errno.EINVAL
    return ctypes.get_errno() if _libc.madvise(address, nbytes, _POPULATE_READ) else 0


def _read(file: MappedFile, offset: int, nbytes: int) -> None:
    """Have the bytes in the system's cache."""
    with file.path.open("rb", buffering=0) as source:
        source.seek(offset)
        buffer = bytearray(nbytes)
        view = memoryview(buffer)
        while view and (count := source.readinto(view)):
            view = view[count:]
    if view:
        file.require_unchanged()
