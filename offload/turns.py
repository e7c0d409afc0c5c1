"""Threads that each drive a device take turns at Python, one block of a model at a time.

Only one thread runs Python at a time, but every call into torch lets another thread in and then waits to come back. So
two threads hand Python over thousands of times in a forward, which takes them longer than one forward after the other
would (the convoy effect: D. Beazley, Understanding the Python GIL, https://www.dabeaz.com/GIL/). Two forwards of Flux
without their computation (on PyTorch's meta device, two cores) took 3.1 times as long as one; with turns they took 2.1
times as long.

Turns are an offer: who waits too long goes on without one until its forward is over. The other thread may be held up by
its device, or wait for this one.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, get_ident

import torch

_PATIENCE_S = 0.02
"""How long a thread waits for its turn: some times as long as the host takes for a block."""

Waiting = tuple[int, Lock]
"""A thread, and the lock that is released when it has the turn."""


class Turns:
    """Who has the turn. It goes to whoever has waited longest."""

    def __init__(self, patience_s: float = _PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._guard = Lock()
        self._holder: int | None = None
        """The thread that has the turn."""
        self._waiting: deque[Waiting] = deque()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """For a forward: begins with this thread's turn. A forward inside of it changes nothing."""
        if self._has_it:
            yield
            return
        with self._guard:
            own = None if self._holder is None else self._queue()
            self._holder = get_ident() if own is None else self._holder
        try:
            if own is not None:
                self._wait(own)
            yield
        finally:
            self._give()

    def pass_on(self, *_: object) -> None:
        """Let those who wait go first. A hook of modules; does nothing in a thread that does not have the turn."""
        if torch.compiler.is_compiling():
            return  # compiled code keeps nothing of this
        if not self._waiting or not self._has_it:
            return
        with self._guard:  # at once: the other one must not come to its next block before this one waits
            own = self._queue()
            self._next()
        self._wait(own)

    @property
    def _has_it(self) -> bool:
        return self._holder == get_ident()

    def _queue(self) -> Waiting:
        own = get_ident(), Lock()
        own[1].acquire()
        self._waiting.append(own)
        return own

    def _wait(self, own: Waiting) -> None:
        try:
            own[1].acquire(timeout=self._patience_s)
        finally:  # too long, or Ctrl-C
            with self._guard:
                if own in self._waiting:
                    self._waiting.remove(own)

    def _give(self) -> None:
        with self._guard:
            if self._has_it:
                self._next()

    def _next(self) -> None:
        if not self._waiting:
            self._holder = None
            return
        self._holder, lock = self._waiting.popleft()
        lock.release()


turns = Turns()
"""Of this process."""
