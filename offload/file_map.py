"""Files as host memory: mapped, not read, so that all processes that use a file share the system's copy of it.

Parts that belong together, such as the tensors of a block, are mapped as one range. Each range has addresses of its
own. Two ranges may share a page of the file, but a page of memory must not be registered with a driver twice.
"""

import ctypes
import errno
import mmap
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
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
    """A file cannot be used as memory, or no longer. The message starts with its name."""

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
    """A file, kept open as long as some of it is mapped. A file that takes its name later is another one."""

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

    It exists as long as a tensor on its memory does. Then the memory is unregistered and unmapped. It is pinned as long
    as there are ``users``.
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
    """Map ``parts``, which are used together, as tensors (uint8, flat) on the file's memory. Nobody may write to them.

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
    """The range that contains a tensor of `map_parts`, or a view of one."""
    return _ranges[tensor.untyped_storage().data_ptr()]


class BringingIn:
    """Has the system read ``ranges`` as far as they are not in RAM, in file order, by several threads.

    A context: it begins with it, and goes on beside what the caller does until `wait` returns, or the context ends.
    """

    def __init__(self, ranges: Iterable[MappedRange]) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="file-map")
        self._parts = [
            (item, start, min(_CHUNK_BYTES, item.nbytes - start))
            for item in sorted(ranges, key=lambda item: (item.file.path, item.offset))
            for start in range(0, item.nbytes, _CHUNK_BYTES)
        ]
        self._chunks: list[Future[int]] = []

    def __enter__(self) -> "BringingIn":
        try:
            self._chunks += (self._pool.submit(_bring_in, *part) for part in self._parts)
        except BaseException:  # the system has no thread left
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._parts.clear()  # they keep the file open

    def wait(self, progress: Callable[[int], None]) -> None:
        """Return when all is in RAM. ``progress`` is called on this thread with the number of bytes since the last
        call; what it raises (for instance ComfyUI's interrupt) is raised here.

        Raises:
            FileMapError: a file was cut short meanwhile, or could not be read.
        """
        for done in as_completed(self._chunks):
            progress(done.result())


def _close_together(parts: Sequence[FilePart]) -> Iterable[list[int]]:
    """Indices of ``parts``, grouped: the parts of a group are close together in one file."""
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
        raise FileMapError(
            path, f"it cannot be opened ({error.strerror or type(error).__name__}). Check the disk, then try again."
        ) from error
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
    """``nbytes`` of ``file`` from ``start`` on, where a page begins. While it exists, every caller gets this memory."""
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
    """A mapping of the file, as an object that torch can make a tensor of.

    The mapping is shared. A private one may be written to, so a system with less memory refuses it, and registering its
    pages copies them.
    """
    if _libc is None:
        return mmap.mmap(descriptor, nbytes, access=mmap.ACCESS_READ, offset=start)
    # Python's own mmap opens the file again for each range, and blocks all threads while it reads.
    address = _libc.mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, start)
    if address == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return (ctypes.c_ubyte * nbytes).from_address(address)


_MAP_FAILED = ctypes.c_void_p(-1).value


def _load_libc() -> ctypes.CDLL | None:
    """The system's C library, if it is POSIX."""
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
    if hasattr(os, "posix_fadvise"):  # ask for the whole chunk before waiting for its first page
        os.posix_fadvise(file.descriptor, item.offset + start, nbytes, os.POSIX_FADV_WILLNEED)
    problem = _populate(item.address + start, nbytes)
    if problem == errno.EINVAL:
        _read(file, item.offset + start, nbytes)
    elif problem:
        file.require_unchanged()
        raise FileMapError(file.path, f"reading it failed ({os.strerror(problem)}). Check the disk, then try again.")
    return nbytes


def _populate(address: int, nbytes: int) -> int:
    """Returns 0 or the system's error number; EINVAL if the system does not know the request."""
    if _libc is None:
        return errno.EINVAL
    return ctypes.get_errno() if _libc.madvise(address, nbytes, _POPULATE_READ) else 0


def _read(file: MappedFile, offset: int, nbytes: int) -> None:
    """Read the bytes, so that they are in the system's cache."""
    with file.path.open("rb", buffering=0) as source:
        source.seek(offset)
        buffer = bytearray(nbytes)
        view = memoryview(buffer)
        while view and (count := source.readinto(view)):
            view = view[count:]
    if view:
        file.require_unchanged()
