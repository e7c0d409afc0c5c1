"""A driver that registers memory in a table, refuses on demand, and takes offence at what a real one would crash on."""

import ctypes
import mmap
import threading
from pathlib import Path


class FakeRegistrar:
    """``refuse_at``: the number of the call to `register`, from 0, that fails with `ERROR`, and all after it.

    As a real one, it takes the pages of a file's map only with ``read_only``, and with ``knows_read_only`` at all.
    """

    ERROR = 2

    NOT_SUPPORTED = 801

    def __init__(self, refuse_at=None, *, knows_read_only=True):
        self.refuse_at = refuse_at
        self.knows_read_only = knows_read_only
        self.calls = 0
        self.registered = {}
        self.log = []

    def __call__(self, device):
        """The registrar for any device is this one."""
        return self

    def register(self, pointer, nbytes, *, read_only=False):
        assert pointer % mmap.PAGESIZE == 0
        assert nbytes > 0
        assert nbytes % mmap.PAGESIZE == 0
        for start, size in self.registered.items():
            assert pointer + nbytes <= start or start + size <= pointer, "registered twice"
        self.calls += 1
        if read_only and not self.knows_read_only:
            return self.NOT_SUPPORTED
        if "w" not in rights(pointer) and not read_only:
            return self.ERROR
        if self.refuse_at is not None and self.calls > self.refuse_at:
            return self.ERROR
        self.registered[pointer] = nbytes
        self.log.append("register")
        return 0

    def unregister(self, pointer):
        del self.registered[pointer]  # KeyError: not registered, or not any more
        rights(pointer)  # still mapped; not read, for a file may have been cut short
        self.log.append("unregister")

    def synchronise(self):
        self.log.append("synchronise")


class GatedRegistrar(FakeRegistrar):
    """Registers as many pieces as it was let to, and waits (10 s at most) to be let register the next."""

    def __init__(self, *arguments, let=0, **options):
        super().__init__(*arguments, **options)
        self._turns = threading.Semaphore(0)
        self.let(let)

    def let(self, count):
        for _ in range(count):
            self._turns.release()

    def register(self, *arguments, **options):
        assert self._turns.acquire(timeout=10), "nobody let it go on"
        return super().register(*arguments, **options)


def rights(pointer):
    """What this process may do with the page at ``pointer``; everything, where the system does not tell."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        ctypes.string_at(pointer, 1)
        return "rw"
    for line in maps.read_text().splitlines():
        addresses, allowed = line.split()[:2]
        first, end = (int(address, 16) for address in addresses.split("-"))
        if first <= pointer < end:
            return allowed
    raise AssertionError("nothing is mapped there")


def pinned_parts(memory):
    """Of each part of a `PinnableMemory`, whether all of it is pinned; of an empty one, not."""
    return [bool(pieces) and all(piece.is_pinned for piece in pieces) for pieces in memory.pieces]
