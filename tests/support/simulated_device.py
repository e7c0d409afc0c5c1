"""A device with two queues on which nothing happens until it must: a missing wait gives wrong bytes, every time.

Compute and copies are launched into a queue each and run later, in an order that an adversary picks among those
that the events allow. Memory that is being written, or was given back, holds poison. So code that is right only by
luck of timing is wrong here.
"""

import ctypes
import random
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import torch

POISON = 0xA5


@dataclass
class Marker:
    """One recording of an event; ``time`` is when it passed, in operations."""

    passed: bool = False
    time: int = 0


_NEVER = Marker(passed=True)


@dataclass
class Event:
    marker: Marker = field(default_factory=lambda: _NEVER)


@dataclass
class Operation:
    """Waits for ``after``, then runs, then passes ``done``."""

    run: Callable[[], None] = lambda: None
    after: Marker | None = None
    done: Marker | None = None


class SimulatedDevice:
    """The `Copies` protocol over simulated queues; `launch` is for the compute that reads what was copied.

    ``reuse`` hands freed memory out again at once, as torch's allocator does for the compute stream.
    """

    device = torch.device("cpu")

    def __init__(self, seed: int = 0) -> None:
        self.adversary = random.Random(seed)
        self.compute: deque[Operation] = deque()
        self.copies: deque[Operation] = deque()
        self.freed: list[torch.Tensor] = []
        self.held_bytes = 0
        self.held: dict[int, int] = {}
        self.copied_bytes = 0
        self.capacity = None
        self.time = 0

    # What the streamer calls.

    def empty(self, nbytes: int) -> torch.Tensor:
        if self.capacity is not None and self.held_bytes + nbytes > self.capacity:
            raise torch.OutOfMemoryError("simulated")
        self.held_bytes += nbytes
        memory = next((m for m in self.freed if m.nbytes >= nbytes > 0), None)
        if memory is None:
            memory = torch.full((nbytes,), POISON, dtype=torch.uint8)
        else:
            self.freed = [other for other in self.freed if other is not memory]
        handed_out = memory[:nbytes].detach()
        self.held[memory.data_ptr()] = nbytes
        weakref.finalize(handed_out, self._free, memory, nbytes)
        return handed_out

    def event(self, *, timed: bool = False) -> Event:
        return Event()

    def elapsed_ms(self, begun: Event, ended: Event) -> float | None:
        if begun.marker is _NEVER or ended.marker is _NEVER:
            raise ValueError("Both events must be recorded before calculating elapsed time.")  # as torch does
        both = begun.marker.passed and ended.marker.passed
        return float(ended.marker.time - begun.marker.time) if both else None

    def copy(
        self,
        pairs: Iterable[tuple[torch.Tensor, torch.Tensor]],
        *,
        after: Event,
        done: Event,
        begun: Event | None = None,
    ) -> None:
        done.marker = Marker()
        start = None
        if begun is not None:
            start = begun.marker = Marker()
        self.copies.append(Operation(after=after.marker, done=start))
        for destination, source in pairs:
            self.copied_bytes += source.nbytes
            # An address, not a tensor: a copy under way must not keep memory that its owner gave back. The source is
            # kept here as the arena keeps it: that does not give memory back before copies from it are done.
            target, nbytes = destination.data_ptr(), source.nbytes
            self.copies.append(Operation(partial(_fill, target, nbytes)))
            self.copies.append(Operation(partial(_move, target, source)))
        self.copies.append(Operation(done=done.marker))
        self._let_time_pass()

    def compute_waits(self, event: Event) -> None:
        self.compute.append(Operation(after=event.marker))
        self._let_time_pass()

    def record(self, event: Event) -> None:
        event.marker = Marker()
        self.compute.append(Operation(done=event.marker))
        self._let_time_pass()

    # What tests call.

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether all of ``tensor`` is in memory of this device."""
        start = tensor.data_ptr()
        return any(first <= start and start + tensor.nbytes <= first + size for first, size in self.held.items())

    def launch(self, kernel: Callable[[], None]) -> None:
        """Queue compute."""
        self.compute.append(Operation(kernel))
        self._let_time_pass()

    def synchronise(self) -> None:
        """Run everything that is queued."""
        while self.compute or self.copies:
            if not (self._step(self.compute) or self._step(self.copies)):
                raise AssertionError("deadlock: each queue waits for the other")
        for memory in self.freed:
            # Someone else's by now: what compute wrote there must still be there.
            assert memory.eq(POISON).all(), "memory was written to after it was given back"

    def _free(self, memory: torch.Tensor, nbytes: int) -> None:
        """Compute gets it next; as torch's allocator does, not before the copies that were queued by now."""
        self.held_bytes -= nbytes
        del self.held[memory.data_ptr()]
        copied = Marker()
        self.copies.append(Operation(done=copied))
        self.compute.append(Operation(lambda: memory.fill_(POISON), after=copied))
        self.freed.append(memory)

    def _let_time_pass(self) -> None:
        """Mostly nothing; sometimes one queue runs as far as it can, sometimes a few operations of both."""
        choice = self.adversary.random()
        if choice < 0.04:
            while self._step(self.copies):
                pass
        elif choice < 0.08:
            while self._step(self.compute):
                pass
        elif choice < 0.4:
            for _ in range(self.adversary.randrange(6)):
                self._step(self.adversary.choice((self.compute, self.copies)))

    def _step(self, queue: deque[Operation]) -> bool:
        if not queue or (queue[0].after is not None and not queue[0].after.passed):
            return False
        operation = queue.popleft()
        operation.run()
        self.time += 1
        if operation.done is not None:
            operation.done.passed, operation.done.time = True, self.time
        return True


def _fill(target: int, nbytes: int) -> None:
    ctypes.memset(target, POISON, nbytes)


def _move(target: int, source: torch.Tensor) -> None:
    ctypes.memmove(target, source.data_ptr(), source.nbytes)
