"""Copies through bounce buffers: nothing overtakes, nothing is lost, nothing hangs, whatever the worker's timing."""

import functools
import gc
import itertools
import random
import threading
import weakref

import bounced_device
import pytest
import streaming_model
import torch
from bounced_device import BouncedDevice, SimulatedLane
from effort import LONG
from mutants import mutant, mutants, over
from own_python import run_script

from flux_nf4.offload import bounce, telemetry
from flux_nf4.offload import record as record_module
from flux_nf4.offload.bounce import BouncedCopies, through_bounce_buffers
from flux_nf4.offload.copies import InlineCopies, StreamCopies
from flux_nf4.offload.streamer import Streamer

CPU = torch.device("cpu")


def some_bytes(nbytes, seed=0):
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def send(copies, source, after=None):
    """Queue a copy of ``source`` to new memory on the device; returns that, to be kept until then, and the event."""
    destination, done = copies.empty(source.nbytes), copies.event()
    copies.copy([(destination, source)], after=copies.event() if after is None else after, done=done)
    return destination, done


def read_by_compute(copies, tensor):
    """Queue a kernel that reads ``tensor``; returns a function that gives what it read."""
    seen = []
    copies.launch(lambda: seen.append(tensor.clone()))
    return functools.partial(seen.__getitem__, 0)


class Held:
    """Holds the worker up inside the block; no longer than the block."""

    def __init__(self, device):
        self.gate = device.lane.gate

    def __enter__(self):
        self.gate.clear()
        return self

    def __exit__(self, *_):
        self.gate.set()


def in_thread(call):
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("pins_every", [0, 2, 3])
def test_a_streamed_model_computes_the_same_bits(pins_every, monkeypatch):
    monkeypatch.setattr(record_module, "SMALL_BYTES", 128)
    monkeypatch.setattr(streaming_model, "SimulatedDevice", functools.partial(BouncedDevice, pins_every=pins_every))
    for seed in range(45 if LONG else 15):
        streaming_model.exercise(Streamer, seed)


SYNCHRONISATIONS = {"calls": ("host_waits", "result", "compute_waits", "record"), "never": "self._lane.event()"}
MUTANTS = mutants(bounce, **SYNCHRONISATIONS)


@pytest.mark.parametrize("number", range(len(MUTANTS)), ids=lambda n: MUTANTS[n].split(":")[0].replace(" ", "-"))
def test_without_any_one_synchronisation_bytes_are_wrong(number, monkeypatch):
    monkeypatch.setattr(record_module, "SMALL_BYTES", 128)
    monkeypatch.setattr(telemetry.Telemetry, "_collect", lambda _: None)  # which would find times missing
    broken = over(mutant(bounce, number, **SYNCHRONISATIONS), bounced_device, bounce.__name__).BouncedDevice
    for seed in range(300):
        # Nothing pinned, so that all goes through the buffers, then some: either way may hide what the other shows.
        device = functools.partial(broken, pins_every=3 * (seed % 2))
        monkeypatch.setattr(streaming_model, "SimulatedDevice", device)
        try:
            streaming_model.exercise(Streamer, seed)
        except AssertionError:
            return
    pytest.fail(f"not needed, or not tested: {MUTANTS[number]}")


@pytest.mark.parametrize("nbytes", [0, 1, 255, 256, 257, 512, 1000])
def test_a_source_of_any_size_arrives_whole(nbytes):
    device = BouncedDevice(pins_every=0)
    source = some_bytes(nbytes)
    destination, done = send(device, source)
    device.compute_waits(done)
    device.synchronise()
    assert torch.equal(destination, source)


def test_compute_waits_for_a_copy_that_the_worker_has_not_come_to():
    device = BouncedDevice(pins_every=0)
    source = some_bytes(700)
    with Held(device):
        destination, done = send(device, source)
        device.lane.compute.clear()
        waiting = in_thread(lambda: device.compute_waits(done))
        waiting.join(0.05)
        assert waiting.is_alive(), "compute would have waited for nothing"
    waiting.join(10)
    assert not waiting.is_alive()
    read = read_by_compute(device, destination)
    device.synchronise()
    assert torch.equal(read(), source)


def test_a_copy_waits_for_the_recording_that_was_there_when_it_was_asked_for(monkeypatch):
    """Not for one that came later: compute after that one may be waiting for this very copy."""
    device = BouncedDevice(pins_every=0)
    monkeypatch.setattr(device.lane, "_let_time_pass", lambda: None)
    source, free = some_bytes(100), device.event()
    device.record(free)
    with Held(device):
        _first, _ = send(device, source)  # holds the worker up
        destination, done = send(device, source, after=free)
        device.record(free)
        later = device.lane.compute.pop()
    device.compute_waits(done)
    device.synchronise()  # a deadlock, if the copy waited for what is never launched
    assert not later.done.passed
    assert torch.equal(destination, source)


def test_pinned_memory_does_not_wait_for_an_idle_worker_nor_overtake_a_busy_one():
    device = BouncedDevice(pins_every=1)
    source = some_bytes(700)
    destinations = [send(device, source)[0]]
    assert device._last is None
    with Held(device):
        device.lane.pins_every = 0
        destinations.append(send(device, source)[0])
        device.lane.pins_every = 1
        destinations.append(send(device, source)[0])
        assert not device._last.done()
    device._last.result()
    device.synchronise()
    assert all(torch.equal(destination, source) for destination in destinations)


def test_nothing_grows_with_the_number_of_copies():
    device = BouncedDevice(pins_every=2)
    source, destination = some_bytes(600), device.empty(600)
    free, ready = device.event(), device.event()

    def live():
        gc.collect()
        return sum(type(thing) in (bounce._Recording, bounce._Job) for thing in gc.get_objects())

    counts = []
    for _ in range(3):
        for _ in range(100):
            device.record(free)
            device.copy([(destination, source)], after=free, done=ready)
        device.compute_waits(ready)
        device.synchronise()
        counts.append(live())
    assert counts[0] == counts[1] == counts[2]
    assert len(device.lane.buffers) == 2


@pytest.mark.parametrize("pins_every", [0, 2])
def test_copies_arrive_in_the_order_of_asking(pins_every):
    device = BouncedDevice(pins_every=pins_every)
    rng = random.Random(0)
    memory, done = device.empty(2000), device.event()
    expected = torch.zeros(2000, dtype=torch.uint8)
    start = device.event()
    sources = [expected.clone()]  # pinned memory must outlive copies from it, as an arena does
    device.copy([(memory, sources[0])], after=start, done=done)
    for seed in range(300):
        begin = rng.randrange(1900)
        source = some_bytes(rng.randrange(1, 2000 - begin), seed)
        sources.append(source)
        expected[begin : begin + source.nbytes] = source
        device.copy([(memory[begin : begin + source.nbytes], source)], after=start, done=done)
    device.compute_waits(done)
    device.synchronise()
    assert torch.equal(memory, expected)


def test_timed_events_tell_how_long_a_copy_took():
    device = BouncedDevice(pins_every=0)
    begun, done, free = device.event(timed=True), device.event(timed=True), device.event()
    destination = device.empty(600)
    with Held(device):
        device.copy([(destination, some_bytes(600))], after=free, begun=begun, done=done)
        assert device.elapsed_ms(begun, done) is None
    device.compute_waits(done)
    device.synchronise()
    assert device.elapsed_ms(begun, done) > 0


def test_a_failure_of_the_worker_is_raised_where_its_bytes_are_needed(monkeypatch):
    device = BouncedDevice(pins_every=0)
    broken, good = some_bytes(300, 1), some_bytes(300, 2)
    copy = device.lane.copy

    def fail(pairs, **events):
        if pairs[0][1][0] == broken[0]:
            device.lane.asked.popleft()
            raise RuntimeError("the bus is gone")
        copy(pairs, **events)

    monkeypatch.setattr(device.lane, "copy", fail)
    lost, failed = send(device, broken)
    for _ in range(2):  # never bytes that did not arrive, however often one asks
        with pytest.raises(RuntimeError, match="the bus is gone"):
            device.compute_waits(failed)
    after_it, done = send(device, good)
    device.compute_waits(done)
    device.synchronise()
    assert torch.equal(after_it, good)
    assert not torch.equal(lost, broken)
    with pytest.raises(RuntimeError, match="the bus is gone"):
        device.compute_waits(send(device, good, after=failed)[1])


def test_a_worker_that_cannot_start_is_an_error_and_no_hang(monkeypatch):
    def fail(self):
        raise RuntimeError("no such device")

    monkeypatch.setattr(SimulatedLane, "enter_thread", fail)
    device = BouncedDevice(pins_every=0)
    with pytest.raises(RuntimeError):
        device.compute_waits(send(device, some_bytes(10))[1])


def test_the_worker_and_its_buffers_go_with_the_last_user():
    device = BouncedDevice(pins_every=0)
    lane = device.lane
    _destination, done = send(device, some_bytes(300))
    device.compute_waits(done)
    buffers = [weakref.ref(buffer) for buffer in lane.buffers]
    lane.buffers.clear()
    lane.synchronise()
    assert lane.worker.is_alive()
    del device
    lane.worker.join(10)
    assert not lane.worker.is_alive()
    assert [buffer() for buffer in buffers] == [None, None]


@pytest.mark.parametrize("pins_every", [0, 1])
def test_a_queued_source_stays_alive_and_a_submitted_one_does_not(pins_every):
    device = BouncedDevice(pins_every=0)
    expected = some_bytes(300)
    source = expected.clone()
    gone = weakref.ref(source)
    with Held(device):
        _first, _ = send(device, expected)  # holds the worker up
        device.lane.pins_every = pins_every
        destination, done = send(device, source)
        del source
        assert gone() is not None
    device.compute_waits(done)
    if not pins_every:  # else the simulated copy reads the source's address later, as a real one does
        assert gone() is None
        device.synchronise()
        assert torch.equal(destination, expected)


def test_a_destination_is_its_owners_alone_once_compute_waits_for_it():
    for _ in range(200):
        device = BouncedDevice(pins_every=0)
        destination, done = send(device, some_bytes(300))
        device.compute_waits(done)
        del destination
        assert device.lane.held_bytes == 0


@pytest.mark.parametrize("inference", [True, False])
def test_destinations_of_either_inference_mode_can_be_written(inference):
    device = BouncedDevice(pins_every=0)
    source = some_bytes(300)
    with torch.inference_mode(inference):
        destination, done = torch.zeros(300, dtype=torch.uint8), device.event()

    def plain_copy(pairs, *, after, done, begun):
        for destination, source in pairs:
            destination.copy_(source)

    device.lane.copy = plain_copy
    device.copy([(destination, source)], after=device.event(), done=done)
    device.compute_waits(done)
    assert torch.equal(destination, source)


@pytest.mark.parametrize("inference", [True, False])
def test_buffers_that_were_made_in_either_inference_mode_can_be_filled(inference):
    with torch.inference_mode(inference):
        device = BouncedDevice(pins_every=0)
    source = some_bytes(300)
    destination, done = send(device, source)
    device.compute_waits(done)
    device.synchronise()
    assert torch.equal(destination, source)


@pytest.mark.parametrize(
    "leave", [lambda model: model.stop(), lambda model: model.start(double=1)], ids=["stop", "start"]
)
def test_a_model_with_copies_in_the_queue_can_be_let_go(leave, monkeypatch):
    monkeypatch.setattr(record_module, "SMALL_BYTES", 128)
    device = BouncedDevice()
    model = streaming_model.StreamedModel(Streamer, device)
    model.forward()
    with Held(device):
        model.forward(order=[4], stop_at=0, stop_before=0)
        model.streamer._conveyor.fetch(range(len(model.streamer._conveyor._staged)))
        assert not device._last.done()
        leaving = in_thread(lambda: leave(model))
        leaving.join(0.05)
    leaving.join(20)
    assert not leaving.is_alive()
    model.forward()
    model.check()
    model.stop()
    model.check()
    device._last.result()  # what is in the queue keeps its memory until it is submitted
    assert device.lane.held_bytes == 0


QUEUED_COPY = """
    from bounced_device import BouncedDevice

    device = BouncedDevice(pins_every=0)
    source, destination = torch.ones(9000, dtype=torch.uint8), torch.zeros(9000, dtype=torch.uint8)
    done, free = device.event(), device.event()
    device.copy([(destination, source)], after=free, done=done)
"""


def test_a_fork_is_told_that_it_has_no_worker():
    out = run_script(
        QUEUED_COPY,
        """
        import signal

        device.compute_waits(done)
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            told = 0
            for call in (
                lambda: device.copy([(destination, source)], after=free, done=done),
                lambda: device.compute_waits(done),
            ):
                try:
                    call()
                except RuntimeError as error:
                    told += "forked" in str(error)
            os._exit(told)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        device.copy([(destination, source)], after=free, done=done)
        device.compute_waits(done)
    """,
    )
    assert out == ["2"]


def test_python_exits_with_copies_in_the_queue_and_users_that_clean_up_late():
    run_script(
        QUEUED_COPY,
        """
        import time

        class User:
            def __del__(self):
                device.compute_waits(done)

        device.lane.latency.random = lambda: time.sleep(0.02) or 1.0
        for _ in range(20):
            device.copy([(destination, source)], after=free, done=done)
        sys.user = User()
    """,
    )


class FakeStreamCopies(StreamCopies):
    """Copies on streams, without a device that has them."""

    def __init__(self, refuse=False):
        self.device = CPU
        self.refuse = refuse
        self.lane = SimulatedLane()

    def event(self, *, timed=False):
        return self.lane.event()

    def pinned(self, nbytes):
        if self.refuse:
            raise RuntimeError("CUDA error: out of memory")
        return self.lane.pinned(nbytes)


def test_users_of_one_device_share_buffers_and_later_ones_get_new_ones():
    copies = FakeStreamCopies()
    first, second = through_bounce_buffers(copies), through_bounce_buffers(copies)
    assert isinstance(first, BouncedCopies)
    assert first is second
    assert len(copies.lane.buffers) == 2
    assert {buffer.nbytes for buffer in copies.lane.buffers} == {bounce.BUFFER_BYTES}
    gone = weakref.ref(first)
    del first, second
    assert gone() is None
    assert through_bounce_buffers(copies) is not None
    assert len(copies.lane.buffers) == 4


def test_where_not_even_the_buffers_can_be_pinned_copies_are_plain_and_it_is_said_once(caplog):
    bounce._say_pageable.cache_clear()
    copies = FakeStreamCopies(refuse=True)
    for _ in range(3):
        assert through_bounce_buffers(copies) is copies
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "out of memory" in messages[0]
    assert caplog.records[0].levelname == "WARNING"


def test_devices_without_streams_need_no_buffers():
    copies = InlineCopies(CPU)
    assert through_bounce_buffers(copies) is copies


@pytest.mark.parametrize("failing", range(6))
def test_a_tile_of_two_parts_of_which_one_did_not_arrive_is_not_computed_with(failing, monkeypatch):
    monkeypatch.setattr(record_module, "SMALL_BYTES", 128)
    model = streaming_model.StreamedModel(Streamer, BouncedDevice(pins_every=0))
    model.set_extras([12] * len(model.layers))
    model.start()
    model.forward()
    model.check()
    lane, numbers = model.device.lane, itertools.count()
    copy = lane.copy

    def fail(pairs, **events):
        if next(numbers) == failing:
            lane.asked.popleft()
            raise RuntimeError("the bus is gone")
        copy(pairs, **events)

    monkeypatch.setattr(lane, "copy", fail)
    with pytest.raises(RuntimeError, match="the bus is gone"):  # noqa: PT012  one of them, as the ring is full at first
        model.forward()
        model.forward()
    model.forward()
    model.check()
