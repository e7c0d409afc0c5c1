"""A family in a process of its own: it loads its weights once and takes turns when it is asked to.

What breaks one contender (a CUDA error, a crash, a hang) ends its process and nothing else; the next request starts a
new one.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cases import Case


@dataclass(frozen=True)
class Request:
    """One turn: the arguments of `turn.take_turn` beside the family."""

    setting: str
    name: str
    case: Case
    effort: Any
    outputs: Path


@dataclass(frozen=True)
class Started:
    """The process is up, with ComfyUI and a context on the device. It has no weights yet."""


@dataclass(frozen=True)
class Loaded:
    """A family is ready: seconds that its weights took, and bytes of host memory of its process before and after."""

    seconds: float
    resident_before: int
    resident: int
    has_dynamic_vram: bool


@dataclass(frozen=True)
class Failure:
    """Why there are no figures. ``is_lasting``: other cases would fail, too."""

    reason: str
    is_lasting: bool


class Worker:
    """The caller's end. ``options`` are the family's (`contenders.Options`); what it prints goes to ``log``."""

    def __init__(self, family: str, options: Any, log: Path) -> None:
        self.loaded: Loaded | None = None
        self._arguments = (family, options, log)
        self._process: Any = None
        self._connection: Any = None

    def start(self) -> None:
        """Begin to start the process, if there is none."""
        if self._process is None:
            self._connection, theirs = get_context("spawn").Pipe()
            self._process = get_context("spawn").Process(target=serve, args=(theirs, *self._arguments))
            self._process.start()
            theirs.close()

    def wait(self, timeout_s: float) -> None:
        """Return when the process is up, or has failed, or has taken longer than this."""
        self._connection.poll(timeout_s)

    def ask(self, request: Request, timeout_s: float) -> Any:
        """`turn.Figures`, or a `Failure`: what it raised, or that it took longer than ``timeout_s``."""
        until, is_useless = time.monotonic() + timeout_s, False
        try:
            self.start()
            self._connection.send(request)
            while True:
                answer = self._receive(until)
                if isinstance(answer, Loaded):
                    self.loaded = answer
                elif not isinstance(answer, Started):
                    break
        except TimeoutError:
            answer, is_useless = Failure(f"not done after {timeout_s:.0f} s", is_lasting=False), True
        except (EOFError, OSError):
            answer = Failure(f"its process ended (exit code {self.stop()}); see its log", is_lasting=True)
        if isinstance(answer, Failure) and self.loaded is None:
            answer = replace(answer, is_lasting=True)
        if is_useless or (isinstance(answer, Failure) and answer.is_lasting):
            self.stop()
        return answer

    def stop(self) -> Any:
        """End the process; its exit code, None if there was none. Idempotent."""
        process, self._process, self.loaded = self._process, None, None
        if process is None:
            return None
        self._connection.close()
        process.join(5)
        process.kill()
        process.join()
        return process.exitcode

    def _receive(self, until: float) -> Any:
        if not self._connection.poll(max(0.0, until - time.monotonic())):
            raise TimeoutError
        return self._connection.recv()


def serve(connection: Connection, family: str, options: Any, log: Path) -> None:
    """The process: answers requests until the other end is closed; the first has it load the weights."""
    log_to(log)
    from inside_comfyui import import_package

    import_package()
    import torch
    from family import Unavailable
    from turn import device_of_comfyui, take_turn

    options.files.enter()
    torch.zeros(1, device=device_of_comfyui())  # the device's context, which is no one's weights
    connection.send(Started())
    loaded = None
    while True:
        try:
            request: Request = connection.recv()
        except EOFError:
            return
        try:
            if loaded is None:
                loaded, told = _load(family, options)
                connection.send(told)
            figures = take_turn(loaded, request.setting, request.name, request.case, request.effort, request.outputs)
            connection.send(figures)
        except (Unavailable, ValueError, torch.OutOfMemoryError) as error:
            connection.send(_failure(error))
        except Exception as error:
            connection.send(_failure(error))
            return  # a CUDA error stays with its process, other errors may leave the model half moved


def make_files(families: Sequence[str], options: Any, log: Path) -> None:
    """A process that makes the files which ``families`` read, where they are not there."""
    log_to(log)
    from inside_comfyui import import_package

    import_package()
    options.files.enter()
    for family in families:
        options.files.make(family)


def in_process(target: Callable[..., None], *arguments: Any) -> int:
    """Run ``target`` in a fresh process to its end; its exit code."""
    process = get_context("spawn").Process(target=target, args=arguments)
    process.start()
    process.join()
    return process.exitcode or 0


def log_to(log: Path) -> None:
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())


def _load(family: str, options: Any) -> tuple[Any, Loaded]:
    import torch
    from contenders import family_maker
    from inside_comfyui import has_dynamic_vram
    from memory import resident_bytes

    make = family_maker(family, options)
    before, started = resident_bytes(), time.perf_counter()
    with torch.inference_mode():
        loaded = make()
    return loaded, Loaded(time.perf_counter() - started, before, resident_bytes(), has_dynamic_vram())


def _failure(error: Exception) -> Failure:
    traceback.print_exception(error)
    kind = type(error).__name__
    text = " ".join(str(error).split())[:300]
    if kind == "OutOfMemoryError":
        return Failure("out of memory", is_lasting=False)
    if kind == "Unavailable":
        return Failure(text, is_lasting=False)
    return Failure(f"{kind}: {text}", is_lasting=kind != "ValueError")
