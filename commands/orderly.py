"""Has a command end in order: in one line, whatever a person or the machine does, with nothing left behind.

Standard library only. The commands for users, the tools and the tests use it. A command imports it before torch: then
Ctrl-C ends it in a line in the seconds that torch takes, too.
"""

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import NoReturn

_SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]

_ADVICE = {
    errno.ENOSPC: "the disk is full. Make room there and run this again.",
    errno.EDQUOT: "your share of the disk is used up. Make room there and run this again.",
    errno.EACCES: "there is no permission for that. Choose another place, or change whose it is.",
    errno.EPERM: "there is no permission for that. Choose another place, or change whose it is.",
    errno.EROFS: "nothing can be written there. Choose another place.",
}
"""What a person can do about errors of the machine, by number."""


class Ended(KeyboardInterrupt):
    """A signal asks this program to end: Ctrl-C, a terminal that is closed, or whoever ends processes."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def end_on_signals() -> None:
    """Have the first signal that asks to end raise `Ended`. Later ones wait for what cleans up after it."""
    for number in _SIGNALS:
        signal.signal(number, _first)


def run(main: Callable[[], None]) -> NoReturn:
    """Run a command to its end.

    Raises:
        SystemExit: always; after a signal or an error of the machine with a line that says so.
    """
    end_on_signals()
    try:
        main()
    except KeyboardInterrupt as error:
        # Python's own end comes now: a signal there would be another line, or end the process with another status.
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        _say("interrupted")
        raise SystemExit(128 + getattr(error, "number", signal.SIGINT)) from None
    except BrokenPipeError:  # whoever reads what this prints, such as head, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except OSError as error:
        if error.errno not in _ADVICE:
            raise
        raise SystemExit(f"{error.filename or 'writing'}: {_ADVICE[error.errno]}") from None
    raise SystemExit(0)


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What Python does with an exception that nobody caught."""
    if issubclass(kind, KeyboardInterrupt):
        _say("interrupted")
    else:
        sys.__excepthook__(kind, error, trace)


def _first(number: int, frame: FrameType | None) -> NoReturn:
    for each in _SIGNALS:
        signal.signal(each, _again)
    raise Ended(number)


def _again(number: int, frame: FrameType | None) -> None:
    _say("ending: a moment")


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, f"\n{text}\n".encode())


sys.excepthook = _show  # until `run` begins
