"""A simulated device whose copies must come from pinned memory, for a caller and the worker of `BouncedCopies`."""

import random
import threading
import time
from collections import deque

import torch
from simulated_device import SimulatedDevice

from flux_nf4.offload.bounce import BouncedCopies


class SimulatedLane(SimulatedDevice):
    """A `Lane`. Its worker is sometimes late; ``gate`` holds it up before each copy while it is cleared.

    ``pins_every``: this share of source addresses count as pinned, if any; the others must be bounced.
    """

    def __init__(self, seed=0, pins_every=0):
        super().__init__(seed)
        self.lock = threading.RLock()
        self.gate = threading.Event()
        self.gate.set()
        self.pins_every = pins_every
        self.buffers = []
        self.worker = None
        self.asked = deque()
        self.latency = random.Random(seed)

    # What the worker calls.

    def enter_thread(self):
        self.worker = threading.current_thread()

    def pinned(self, nbytes):
        self.buffers.append(torch.empty(nbytes, dtype=torch.uint8))
        return self.buffers[-1]

    def is_pinned(self, source):
        if threading.current_thread() is self.worker:
            assert self.gate.wait(20)
            if self.latency.random() < 0.1:
                time.sleep(1e-4)
        return self.pins_every and source.data_ptr() // 256 % self.pins_every == 0

    def host_waits(self, event):
        """Let time pass until ``event`` has passed, and not much more."""
        while True:
            with self.lock:
                if event.marker.passed:
                    return
                queues = [self.compute, self.copies]
                self.adversary.shuffle(queues)
                assert any(map(self._step, queues)), "deadlock: what the host waits for can never pass"

    def copy(self, pairs, **events):
        asked = self.asked[0]
        for destination, source in pairs:
            (pointer, left), nbytes = asked.popleft(), destination.nbytes
            assert pointer == destination.data_ptr(), "a copy overtook another"
            if left > nbytes:
                asked.appendleft((pointer + nbytes, left - nbytes))
            if nbytes and not self._is_in_a_buffer(source):
                assert self.is_pinned(source), "a copy of memory that is not pinned"
        if not asked:
            self.asked.popleft()
        with self.lock:
            super().copy(pairs, **events)

    def _is_in_a_buffer(self, source):
        return any(
            buffer.data_ptr() <= source.data_ptr() < buffer.data_ptr() + buffer.nbytes for buffer in self.buffers
        )

    # What the caller calls.

    def empty(self, nbytes):
        with self.lock:
            return super().empty(nbytes)

    def compute_waits(self, event):
        with self.lock:
            super().compute_waits(event)

    def record(self, event):
        with self.lock:
            super().record(event)

    def launch(self, kernel):
        with self.lock:
            super().launch(kernel)

    def synchronise(self):
        with self.lock:
            super().synchronise()

    def _free(self, memory, nbytes):
        with self.lock:
            super()._free(memory, nbytes)


class BouncedDevice(BouncedCopies):
    """`BouncedCopies` with what tests call on a `SimulatedDevice`; buffers are smaller than most tiles."""

    def __init__(self, seed=0, pins_every=3, buffer_bytes=256):
        self.lane = SimulatedLane(seed, pins_every)
        super().__init__(self.lane, buffer_bytes)

    def copy(self, pairs, **events):
        self.lane.asked.append(deque((destination.data_ptr(), source.nbytes) for destination, source in pairs))
        super().copy(pairs, **events)

    def holds(self, tensor):
        return self.lane.holds(tensor)

    def launch(self, kernel):
        self.lane.launch(kernel)

    def synchronise(self):
        self.lane.synchronise()
