"""Memory that is registered with a driver on a thread of its own, while a model is made and its first forward runs.

To register 6.7 GB of a file takes the driver 0.3 s (H200), as long as all else that loading does. One rule lets the
first forward begin before that is over: what the thread is to register counts as pinned from the start, and whoever
copies from it waits for its own piece (`until_registered`). If the thread ends early, the pieces that are left count no
longer, and nobody waits for them: copies from there are right, but slow, until somebody pins again.

While it registers a piece, which takes 5 ms for 100 MB, the driver lets everybody else wait. So it stands still where a
thread has many short calls to make (`paused`).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Event, Thread, current_thread

import torch

from . import pinning
from .pinning import Piece, Registrar, refused

_LOOK_S = 0.001
"""So often a thread that stands still looks whether it has to."""

_pending: dict[int, Event] = {}
"""By address, the pieces that are still to be registered. Each event is set when that is over, done or not."""


class _Ahead(Thread):
    """Registers ``pieces``, which ``owner`` keeps in memory, until it is told to stop or the driver refuses one."""

    def __init__(self, owner: object, pieces: Sequence[Piece], registrar: Registrar) -> None:
        super().__init__(name="pinning-ahead")
        self.must_stop = Event()
        self.over: Future[str] = Future()
        """Why it has ended early, as a clause; "" if it has not, or was told to."""
        self.ended = Event()
        """All is over, calls that were waiting for that (`when_over`) too."""
        self._paused: list[None] = []
        self._awaited: list[None] = []
        """As long as the threads are many that want it to stand still, and that wait for it, which come first. Without
        a lock, by what is atomic: the garbage collector may have any thread wait at any time."""
        self._owner: object = owner
        self._left = deque(pieces)
        self._registrar = registrar
        for piece in pieces:
            piece.count()
            _pending[piece.pointer] = Event()

    def run(self) -> None:
        global _thread
        problem = ""
        try:
            problem = self._register()
        except Exception as error:  # whoever pins next tries again, and raises it
            problem = f"the driver failed ({error})"
        finally:
            self._leave_the_rest()
            self._owner = None
            self.over.set_result(problem)
            _thread = None
            self.ended.set()

    def _register(self) -> str:
        while self._left and self._may_go_on():
            if error := self._left[0].register(self._registrar):
                return refused(error)
            _pending.pop(self._left.popleft().pointer).set()
        return ""

    def _may_go_on(self) -> bool:
        """Waits while it has to stand still. Returns False if it has to stop."""
        while self._paused and not self._awaited and not self.must_stop.wait(_LOOK_S):
            pass
        return not self.must_stop.is_set()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """It begins no piece as long as this lasts, unless somebody waits for it."""
        self._paused.append(None)
        try:
            yield
        finally:
            self._paused.pop()

    def wait_for(self, event: Event) -> None:
        """Wait for what it does."""
        self._awaited.append(None)
        try:
            event.wait()
        finally:
            self._awaited.pop()

    def _leave_the_rest(self) -> None:
        """What is left does not count any more, and nobody waits for it."""
        while self._left:
            piece = self._left.popleft()
            piece.discount()
            _pending.pop(piece.pointer).set()


_thread: _Ahead | None = None
"""The one that is under way. One at a time: a driver registers one piece after the other anyway."""


def start(owner: object, pieces: Sequence[Piece], registrar: Registrar) -> None:
    """Begin to register ``pieces``, in order. ``owner`` keeps their memory, and is kept until that has ended.

    Whoever unpins waits for that. What the driver refuses is left to whoever pins next: they try again.
    """
    global _thread
    wait()
    thread = _thread = _Ahead(owner, pieces, registrar)
    pinning.pins_changed()
    try:
        thread.start()
    except RuntimeError:  # the system has no thread left
        thread.must_stop.set()
        thread.run()


def until_registered(sources: Iterable[torch.Tensor]) -> None:
    """Wait until the memory of ``sources`` is registered, as far as the thread is going to do that."""
    if not _pending:
        return  # in all forwards but the first
    for source in sources:
        event, thread = _pending.get(source.untyped_storage().data_ptr()), _thread
        if event is not None:
            event.wait() if thread is None else thread.wait_for(event)


@contextmanager
def paused() -> Iterator[None]:
    """The thread begins no piece as long as this context lasts, unless somebody waits for one, or for all."""
    thread = _thread
    if thread is None:
        yield
    else:
        with thread.paused():
            yield


def wait() -> None:
    """Wait until all is registered that `start` was given.

    Does nothing where that would be for ever, as the garbage collector may call this at any time: on the thread that
    registers, and before that has begun.
    """
    thread = _thread
    if thread is not None and thread.is_alive() and thread is not current_thread():
        thread.wait_for(thread.ended)
        pinning.pins_changed()


def when_over(call: Callable[[str], None]) -> None:
    """Have ``call`` called, now or by the thread when it has ended; with why it has ended early, as a clause, or ""."""
    thread = _thread
    if thread is None:
        call("")
    else:
        thread.over.add_done_callback(lambda over: call(over.result()))


def stop() -> None:
    """Wait for the piece that is being registered, if any, and leave the others."""
    thread = _thread
    if thread is not None:
        thread.must_stop.set()
    wait()
