"""Copies beside compute on a GPU: what waits for what, and memory that goes while a copy to it is under way.

Each test of a wait is also run without it, to show that the bytes are then wrong: that the test would notice.
"""

import comfy.model_management
import pytest
import torch
from gpu_models import DEVICE

from flux_nf4.offload import copies as copies_module
from flux_nf4.offload.copies import copies_to

NBYTES = 256 << 20
"""Some milliseconds on any bus: a kernel that does not wait for the copy is done before it."""

CYCLES = 20_000_000
"""Some ten milliseconds of compute."""


@pytest.fixture
def copies():
    torch.cuda.synchronize()
    yield copies_to(DEVICE)
    torch.cuda.synchronize()


@pytest.fixture(scope="module")
def source():
    """Pinned bytes, all of them 1."""
    return torch.ones(NBYTES, dtype=torch.uint8, pin_memory=True)


def passed(copies):
    """An event that nobody has to wait for."""
    return copies.event()


@pytest.mark.parametrize("waits", [True, False], ids=["as it is", "without the wait"])
def test_compute_waits_for_a_copy(waits, copies, source):
    place, read = copies.empty(NBYTES).zero_(), torch.empty(NBYTES, dtype=torch.uint8, device=DEVICE)
    torch.cuda.synchronize()
    ready = copies.event()
    copies.copy([(place, source)], after=passed(copies), done=ready)
    if waits:
        copies.compute_waits(ready)
    read.copy_(place)
    torch.cuda.synchronize()
    assert bool(read.all()) is waits


@pytest.mark.parametrize("waits", [True, False], ids=["as it is", "without the wait"])
def test_a_copy_waits_for_compute_that_reads_its_place(waits, copies, source):
    place, read = copies.empty(NBYTES).zero_(), torch.empty(NBYTES, dtype=torch.uint8, device=DEVICE)
    torch.cuda.synchronize()
    free = copies.event()
    torch.cuda._sleep(CYCLES)
    read.copy_(place)
    if waits:
        copies.record(free)
    copies.copy([(place, source)], after=free, done=copies.event())
    torch.cuda.synchronize()
    assert bool(read.any()) is not waits
    assert place.all()


@pytest.mark.parametrize("is_recorded", [True, False], ids=["as it is", "without record_stream"])
def test_memory_that_goes_is_not_given_out_while_a_copy_to_it_is_under_way(is_recorded, copies, source):
    torch.cuda.empty_cache()  # what fits exactly is then only what goes here
    place = copies.empty(NBYTES) if is_recorded else torch.empty(NBYTES, dtype=torch.uint8, device=DEVICE)
    address, free = place.data_ptr(), copies.event()
    torch.cuda._sleep(CYCLES)
    copies.record(free)
    copies.copy([(place, source)], after=free, done=copies.event())
    del place
    other = torch.empty(NBYTES, dtype=torch.uint8, device=DEVICE)
    assert (other.data_ptr() != address) is is_recorded


def test_the_host_waits_for_no_copy(copies, source):
    place, begun, done = copies.empty(NBYTES), torch.cuda.Event(), copies.event()
    torch.cuda._sleep(CYCLES)
    begun.record()
    copies.record(free := copies.event())
    copies.copy([(place, source)], after=free, done=done)
    copies.compute_waits(done)
    assert not begun.query(), "the call returned only when the device was done"


def test_a_timed_copy_tells_how_long_it_took(copies, source):
    begun, done = copies.event(timed=True), copies.event(timed=True)
    copies.copy([(copies.empty(NBYTES), source)], after=passed(copies), done=done, begun=begun)
    torch.cuda.synchronize()
    gbps = NBYTES / copies.elapsed_ms(begun, done) / 1e6
    assert 1 < gbps < 2000


@pytest.fixture
def slow_compute(tiny):
    """Every layer waits on the device before it reads its weight: any host is far ahead."""
    handles = [
        module.register_forward_pre_hook(lambda *_: torch.cuda._sleep(CYCLES // 4))
        for module in tiny.loaded.model.diffusion_model.modules()
        if hasattr(module, "out_features")
    ]
    yield
    for handle in handles:
        handle.remove()


@pytest.fixture
def slow_copies(copies, source, monkeypatch):
    """Each copy comes after one of 256 MiB: on any host compute gets to every layer before its bytes do."""
    padding = copies.empty(NBYTES)
    copy = copies_module.StreamCopies.copy

    def slowly(self, pairs, **events):
        copy(self, [(padding, source)], after=events["after"], done=self.event())
        copy(self, pairs, **events)

    monkeypatch.setattr(copies_module.StreamCopies, "copy", slowly)


def two_forwards(model, patcher):
    comfy.model_management.load_models_gpu([patcher])
    return [model.forward(patcher, seed) for seed in (2, 3)]


@pytest.mark.usefixtures("slow_compute")
def test_slow_compute_reads_its_own_bytes(tiny):
    expected = two_forwards(tiny, tiny.resident())
    assert all(map(torch.equal, two_forwards(tiny, tiny.with_counts(0, 0)), expected))


@pytest.mark.usefixtures("slow_copies")
def test_compute_reads_nothing_before_a_slow_copy_brings_it(tiny):
    expected = two_forwards(tiny, tiny.resident())
    assert all(map(torch.equal, two_forwards(tiny, tiny.with_counts(0, 0)), expected))


@pytest.mark.usefixtures("slow_compute")
def test_with_slow_compute_copies_that_wait_for_nothing_are_noticed(tiny, monkeypatch):
    expected = two_forwards(tiny, tiny.resident())
    copy = copies_module.StreamCopies.copy

    def at_once(self, pairs, *, after, **events):
        copy(self, pairs, after=self.event(), **events)

    monkeypatch.setattr(copies_module.StreamCopies, "copy", at_once)
    assert not all(map(torch.equal, two_forwards(tiny, tiny.with_counts(0, 0)), expected))


@pytest.mark.usefixtures("slow_copies")
def test_with_slow_copies_compute_that_waits_for_nothing_is_noticed(tiny, monkeypatch):
    expected = two_forwards(tiny, tiny.resident())
    empty = copies_module.StreamCopies.empty
    # The allocator may give the ring of an earlier test, with the right bytes in it.
    monkeypatch.setattr(copies_module.StreamCopies, "empty", lambda *args: empty(*args).fill_(0x7F))
    monkeypatch.setattr(copies_module.StreamCopies, "compute_waits", lambda *_: None)
    assert not all(map(torch.equal, two_forwards(tiny, tiny.with_counts(0, 0)), expected))
