"""Copies from host memory that is not pinned, through two small pinned buffers that a worker thread fills.

A plain copy from pageable memory blocks the calling thread until the bytes have left, and reaches a fraction of the
bus's speed. Here the worker fills one buffer while the bus empties the other. Copies must reach the copy stream in the
order in which they were asked for. So copies from pinned memory go through the worker's queue, too, unless the queue is
empty.

One thing differs from `StreamCopies`. On the device, compute can wait only for copies that have been submitted. If it
needs a copy before that, the calling thread waits until the worker has submitted it.
"""

import functools
import logging
import os
import weakref
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from ..memory import MIB
from .copies import Copies, Pairs, StreamCopies

logger = logging.getLogger(__name__)

BUFFER_BYTES = 32 * MIB
"""Size of each of the two buffers. Most tiles of Flux in NF4 fit into one."""


class Lane(Copies, Protocol):
    """Copies that the worker uses: the host can wait for their events, and they know which memory is pinned."""

    def enter_thread(self) -> None: ...

    def host_waits(self, event: Any) -> None: ...

    def pinned(self, nbytes: int) -> torch.Tensor: ...

    def is_pinned(self, source: torch.Tensor) -> bool: ...


@dataclass(frozen=True)
class _Recording:
    """One recording of a caller's event.

    ``event`` is an event of the lane, which is recorded only once. ``submission`` is done when the worker has recorded
    it; None if the calling thread has done so.
    """

    event: Any
    submission: "Future[None] | None" = None

    def submitted(self) -> Any:
        """Wait until the lane's event has been recorded, and return it. Raises the error that prevented that."""
        if self.submission is not None:
            self.submission.result()
        return self.event


@dataclass
class _Event:
    """The caller's event. It is recorded again and again, while the worker still needs earlier recordings."""

    is_timed: bool
    recording: _Recording


@dataclass
class _Job:
    """Copies in the worker's queue. They keep their memory alive until they are submitted, and no longer."""

    pairs: list[tuple[torch.Tensor, torch.Tensor]]
    after: Any
    done: Any
    begun: Any

    def take(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        pairs, self.pairs = self.pairs, []
        return pairs


@dataclass
class _Buffer:
    """Pinned memory, and the event that passes when its bytes have left it."""

    memory: torch.Tensor
    emptied: Any


class _Step(NamedTuple):
    """One copy to the lane."""

    destination: torch.Tensor
    source: torch.Tensor
    is_pinned: bool


class _Bounce:
    """The worker's side: submits one copy after the other to the lane."""

    def __init__(self, lane: Lane, buffer_bytes: int) -> None:
        self._lane = lane
        self._buffers = deque(_Buffer(lane.pinned(buffer_bytes), lane.event()) for _ in range(2))

    def submit(self, job: _Job) -> None:
        # Each thread has its own inference mode. In it, ordinary tensors and inference tensors may be written.
        with torch.inference_mode():
            steps = [step for pair in job.take() for step in self._steps(*pair)]
            begun = job.begun
            for i, step in enumerate(steps):
                done = job.done if i == len(steps) - 1 else self._lane.event()
                filled = step.source if step.is_pinned else self._fill(step.source, emptied=done)
                self._lane.copy([(step.destination, filled)], after=job.after, done=done, begun=begun)
                begun = None

    def _steps(self, destination: torch.Tensor, source: torch.Tensor) -> Iterable[_Step]:
        """The copy as it is where ``source`` is pinned, else in parts that fit into a buffer."""
        is_pinned = self._lane.is_pinned(source)
        nbytes = source.nbytes if is_pinned else self._buffers[0].memory.nbytes
        for target, part in zip(destination.split(nbytes), source.split(nbytes), strict=True):
            yield _Step(target, part, is_pinned)

    def _fill(self, source: torch.Tensor, emptied: Any) -> torch.Tensor:
        """``source`` in a buffer, whose bytes will have left it when ``emptied`` passes."""
        buffer = self._buffers[0]
        self._buffers.rotate()
        self._lane.host_waits(buffer.emptied)
        buffer.emptied = emptied
        return buffer.memory[: source.nbytes].copy_(source)


class BouncedCopies:
    """`Copies` to ``lane.device`` from host memory that need not be pinned.

    When this object goes, its worker ends and its buffers are freed. If a copy fails, `compute_waits` raises the error.

    Raises:
        RuntimeError: the buffers cannot be pinned.
    """

    def __init__(self, lane: Lane, buffer_bytes: int = BUFFER_BYTES) -> None:
        self.device = lane.device
        self._lane = lane
        self._bounce = _Bounce(lane, buffer_bytes)
        self._worker = ThreadPoolExecutor(1, "bounce", initializer=lane.enter_thread)
        self._last: Future[None] | None = None
        self._process = os.getpid()

    def empty(self, nbytes: int) -> torch.Tensor:
        return self._lane.empty(nbytes)

    def event(self, *, timed: bool = False) -> _Event:
        return _Event(timed, _Recording(self._lane.event(timed=timed)))

    def elapsed_ms(self, begun: _Event, ended: _Event) -> float | None:
        for recording in (begun.recording, ended.recording):
            submission = recording.submission
            if submission is not None and (not submission.done() or submission.exception() is not None):
                return None
        return self._lane.elapsed_ms(begun.recording.event, ended.recording.event)

    def copy(self, pairs: Pairs, *, after: _Event, done: _Event, begun: _Event | None = None) -> None:
        self._refuse_fork()
        job = _Job(
            list(pairs),
            after.recording.submitted(),
            self._lane.event(timed=done.is_timed),
            None if begun is None else self._lane.event(timed=True),
        )
        submission = None
        if (self._last is None or self._last.done()) and all(self._lane.is_pinned(source) for _, source in job.pairs):
            self._lane.copy(job.take(), after=job.after, done=job.done, begun=job.begun)
        else:
            submission = self._last = self._worker.submit(self._bounce.submit, job)
        done.recording = _Recording(job.done, submission)
        if begun is not None:
            begun.recording = _Recording(job.begun, submission)

    def compute_waits(self, event: _Event) -> None:
        self._refuse_fork()
        self._lane.compute_waits(event.recording.submitted())

    def record(self, event: _Event) -> None:
        recorded = self._lane.event(timed=event.is_timed)
        self._lane.record(recorded)
        event.recording = _Recording(recorded)

    def _refuse_fork(self) -> None:
        # A fork does not inherit threads: the caller would wait for the worker for ever.
        if os.getpid() != self._process:
            raise RuntimeError(
                "this process was forked from the one that streams the model: load the model again, or start the "
                "process with multiprocessing's method 'spawn'"
            )


_shared: "weakref.WeakValueDictionary[Copies, BouncedCopies]" = weakref.WeakValueDictionary()


def through_bounce_buffers(copies: Copies) -> Copies:
    """``copies``, made to work from host memory that is not pinned. All callers share one result while it is in use.

    Where not even the buffers can be pinned, this is ``copies`` itself, and the log says so.
    """
    if not isinstance(copies, StreamCopies):
        return copies
    bounced = _shared.get(copies)
    if bounced is None:
        try:
            bounced = BouncedCopies(copies)
        except RuntimeError as error:
            _say_pageable(copies.device, str(error))
            return copies
        _shared[copies] = bounced
    return bounced


@functools.cache
def _say_pageable(device: torch.device, error: str) -> None:
    logger.warning(
        "Streaming: not even %d MiB of host memory could be pinned for %s, so the computation waits for copies from "
        "memory that is not pinned: %s",
        2 * BUFFER_BYTES // MIB,
        device,
        error,
    )
