"""Memory that is registered with a driver on a thread of its own, while a model that needs it is still being made.

To register 6.7 GB of a file takes the driver 0.3 s (H200), as long as all else that loading does. One thread at a time:
a driver registers one piece after the other anyway.
"""

from collections.abc import Sequence
from threading import Event, Thread, current_thread

from . import pinning
from .pinning import Piece, Registrar


class _Ahead(Thread):
    """Registers ``pieces``, which ``owner`` keeps in memory, until it is told to stop or the driver refuses one."""

    def __init__(self, owner: object, pieces: Sequence[Piece], registrar: Registrar) -> None:
        super().__init__(name="pinning-ahead", daemon=True)
        self.must_stop = Event()
        self._work: tuple[object, Sequence[Piece], Registrar] | None = (owner, pieces, registrar)

    def run(self) -> None:
        assert self._work is not None
        _, pieces, registrar = self._work
        try:
            for piece in pieces:
                if self.must_stop.is_set() or piece.pins.register(registrar, piece.pointer, piece.nbytes, tell=False):
                    break
        finally:
            self._work = None


_thread: _Ahead | None = None


def start(owner: object, pieces: Sequence[Piece], registrar: Registrar) -> None:
    """Begin to register ``pieces``, in order. ``owner`` keeps their memory, and is kept until that has ended.

    Whoever pins or unpins waits for it (`wait`). What the driver refuses is left to them: they try again, and say why.
    """
    global _thread
    wait()
    thread = _Ahead(owner, pieces, registrar)
    thread.start()  # before others can wait for it
    _thread = thread


def wait() -> None:
    """Wait until everything is registered that `start` was given."""
    global _thread
    if _thread is not None and _thread is not current_thread():
        _thread.join()
        _thread = None
        pinning.pins_changed()


def stop() -> None:
    """Wait for the piece that is being registered, if any, and leave the others."""
    if _thread is not None:
        _thread.must_stop.set()
    wait()
