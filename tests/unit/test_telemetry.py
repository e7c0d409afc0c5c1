"""Figures of forwards: counted always, timed now and then, read once they have passed on the device."""

import pytest
import torch
from simulated_device import SimulatedDevice
from streaming_model import StreamedModel

from flux_nf4.offload import record as record_module
from flux_nf4.offload.copies import InlineCopies
from flux_nf4.offload.streamer import Streamer
from flux_nf4.offload.telemetry import Link, Telemetry, summarise


@pytest.fixture(autouse=True)
def _small_blocks_are_streamed(monkeypatch):
    monkeypatch.setattr(record_module, "SMALL_BYTES", 128)


@pytest.fixture
def model():
    model = StreamedModel(Streamer, SimulatedDevice())
    model.start(double=1)
    return model


def test_steady_forwards_copy_what_the_plan_says_and_refetch_nothing(model):
    model.forward()  # the first learns the order of the layers
    before = model.streamer.telemetry.forwards
    for _ in range(5):
        model.forward()
    model.check()
    telemetry = model.streamer.telemetry
    assert telemetry.forwards - before == 5  # each ends when the next begins
    assert telemetry.last.copied_bytes == model.streamer.plan.bytes_per_forward
    assert telemetry.last.refetched == 0


def test_skipped_blocks_show_as_refetched_tiles(model):
    for _ in range(3):
        model.forward()
    model.forward(order=[0, 7, 2])
    model.forward()
    model.check()
    assert model.streamer.telemetry.last.refetched > 0


def test_nothing_is_reported_before_it_has_passed(model):
    for _ in range(3):
        model.forward()
    telemetry = Telemetry(model.device, 3)
    for block in (0, 1, 0, 1):
        telemetry.tile((block, 0))
    model.device.adversary.random = lambda: 1.0  # time stands still
    for block in (0, 1):
        telemetry.tile((block, 0))
    assert telemetry.last_timed is None
    model.device.synchronise()
    assert telemetry.last_timed is not None


def test_stall_is_part_of_the_time_and_found_where_copies_are_late(model):
    for _ in range(3):
        model.forward()
    model.check()
    cost = model.streamer.telemetry.last_timed
    assert 0 < cost.stall_ms < cost.total_ms


def test_the_speed_of_the_link_can_be_asked_for_at_any_time(model):
    """In the first forward, too, which may be cancelled: learning the order of the layers makes new events."""
    asked = []
    for block in model.streamer.blocks:
        for tile in block.tiles:
            tile.module.register_forward_hook(lambda *_: asked.append(model.streamer.telemetry.link_gbps))
    model.forward()
    model.forward()
    model.check()
    assert asked
    assert model.streamer.telemetry.link_gbps > 0


def test_a_stall_is_measured_and_advised_upon():
    class LateDevice(InlineCopies):
        """Each wait takes as long as `late` says."""

        late = 0.0

        def __init__(self):
            super().__init__("cpu")
            self.now = 0.0

        def record(self, event):
            self.now += 0.001
            event.seconds = self.now

        def compute_waits(self, event):
            self.now += self.late

    def line(late, is_pinned=True, gigabytes=0.02):
        device = LateDevice()
        device.late = late
        begun, ended = device.event(timed=True), device.event(timed=True)
        begun.seconds, ended.seconds = 0.0, 0.001
        telemetry = Telemetry(device, 4)
        telemetry.copied(0, Link(int(gigabytes * 1e9), begun, ended))
        for _ in range(3):
            for block in range(4):
                telemetry.tile((block, 0))
                telemetry.copied(10**9)
                before = telemetry.before_wait()
                device.compute_waits(None)
                if before is not None:
                    telemetry.after_wait(before)
        return summarise(telemetry, is_pinned)

    assert "4.00 GB over a bus of 20.0 GB/s" in line(0.0)
    assert "waited 204.0 ms" in line(0.05)
    assert line(0.05).endswith("each GiB of them saves about 54 ms")
    assert "Not all host memory is pinned" in line(0.05, is_pinned=False)
    assert "full-width slot" in line(0.05, gigabytes=0.003)


def test_the_time_between_samplings_is_in_no_forward():
    class Clock(InlineCopies):
        now = 0.0

        def record(self, event):
            event.seconds = self.now

    clock = Clock(torch.device("cpu"))
    telemetry = Telemetry(clock, 2)

    def forwards(count):
        for _ in range(count):
            telemetry.tile((0, 0))
            clock.now += 0.1
            telemetry.tile((1, 0))

    forwards(2)  # the second is timed
    telemetry.rest()
    telemetry.rest()
    clock.now += 3.0
    assert telemetry.forwards == 2
    assert telemetry.last_timed.total_ms == pytest.approx(100)
    for _ in range(20):
        forwards(3)
        telemetry.rest()
        clock.now += 3.0
        assert telemetry.last_timed.total_ms == pytest.approx(100)
    assert telemetry.forwards == 62


def test_without_a_timed_forward_there_is_no_line(model):
    assert summarise(model.streamer.telemetry, True) is None


def test_the_cost_of_a_forward_says_which_picture_it_was_for():
    device = SimulatedDevice()
    telemetry = Telemetry(device, 3)
    for picture in (None, (1024, 1024), (512, 512)):
        telemetry.picture = picture
        for _ in range(2):
            for block in range(3):
                telemetry.tile((block, 0))
        telemetry.picture = (1, 1)  # of a forward that has not begun
        telemetry.rest()
        device.synchronise()
        assert telemetry.last.picture == picture
    telemetry.picture = (8, 8)
    for block in (0, 1, 2, 0):
        telemetry.tile((block, 0))
    telemetry.picture = (16, 16)
    telemetry.tile((1, 0))
    device.synchronise()
    assert telemetry.last.picture == (8, 8)
