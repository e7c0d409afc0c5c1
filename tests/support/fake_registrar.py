"""A driver that registers memory in a table, refuses on demand, and takes offence at what a real one would crash on."""

import ctypes
import mmap


class FakeRegistrar:
    """``refuse_at``: the number of the call to `register`, from 0, that fails with `ERROR`, and all after it."""

    ERROR = 2

    def __init__(self, refuse_at=None):
        self.refuse_at = refuse_at
        self.calls = 0
        self.registered = {}
        self.log = []

    def __call__(self, device):
        """The registrar for any device is this one."""
        return self

    def register(self, pointer, nbytes):
        assert pointer % mmap.PAGESIZE == 0
        assert nbytes > 0
        assert nbytes % mmap.PAGESIZE == 0
        for start, size in self.registered.items():
            assert pointer + nbytes <= start or start + size <= pointer, "registered twice"
        self.calls += 1
        if self.refuse_at is not None and self.calls > self.refuse_at:
            return self.ERROR
        self.registered[pointer] = nbytes
        self.log.append("register")
        return 0

    def unregister(self, pointer):
        del self.registered[pointer]  # KeyError: not registered, or not any more
        ctypes.string_at(pointer, 1)  # still mapped
        self.log.append("unregister")

    def synchronise(self):
        self.log.append("synchronise")
