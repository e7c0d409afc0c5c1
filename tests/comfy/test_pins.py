"""ComfyUI's count of pinned memory and this package's share of it."""

import threading
import time
from types import SimpleNamespace

import comfy.model_management
import pytest
import torch

from flux_nf4.offload import pinning
from flux_nf4.offload.comfyui import pins

MIB = 2**20


@pytest.fixture
def management(monkeypatch):
    """ComfyUI's, with nothing pinned by anyone."""
    monkeypatch.setattr(comfy.model_management, "TOTAL_PINNED_MEMORY", 0, raising=False)
    monkeypatch.setattr(comfy.model_management, "MAX_PINNED_MEMORY", 100 * MIB, raising=False)
    monkeypatch.setattr(pins, "_counted_bytes", 0)
    return comfy.model_management


def pin(monkeypatch, nbytes):
    monkeypatch.setattr(pins, "pinned_by_all", lambda: nbytes)
    pins._count_pins()


def counted(management):
    return management.TOTAL_PINNED_MEMORY


def limit():
    return pins.pin_limit(0)[0]


def test_both_count_for_one_limit(management, monkeypatch):
    assert limit() == 100 * MIB
    pin(monkeypatch, 40 * MIB)
    assert counted(management) == 40 * MIB
    management.TOTAL_PINNED_MEMORY += 10 * MIB  # by ComfyUI
    assert limit() == 90 * MIB
    pin(monkeypatch, 30 * MIB)
    assert counted(management) == 40 * MIB


@pytest.mark.parametrize("pinned_since", [0, 10 * MIB])
def test_a_count_that_comfyui_has_set_to_zero_gets_this_packages_share_back(management, monkeypatch, pinned_since):
    pin(monkeypatch, 40 * MIB)
    management.TOTAL_PINNED_MEMORY = pinned_since  # set to 0 as the last of ComfyUI's pins went
    assert limit() == 100 * MIB - pinned_since
    assert counted(management) == 40 * MIB + pinned_since
    management.TOTAL_PINNED_MEMORY = pinned_since
    pin(monkeypatch, 0)
    assert counted(management) == pinned_since


def test_a_comfyui_that_pins_nothing_of_its_own_accord_forbids_nothing(management, monkeypatch):
    monkeypatch.setattr(management, "MAX_PINNED_MEMORY", -1)
    assert limit() > 100 * MIB


class Management:
    """ComfyUI's, whose counter calls ``before`` and ``after`` when it is written to, each once."""

    WINDOWS, MAX_PINNED_MEMORY = False, 100 * MIB

    def __init__(self):
        self.total = 0
        self.before = self.after = lambda: None

    @property
    def TOTAL_PINNED_MEMORY(self):
        return self.total

    @TOTAL_PINNED_MEMORY.setter
    def TOTAL_PINNED_MEMORY(self, total):
        before, self.before = self.before, lambda: None
        before()
        self.total = total
        after, self.after = self.after, lambda: None
        after()


@pytest.fixture
def interrupted(monkeypatch):
    """A `Management` in ComfyUI's place, with 40 MiB pinned by this package and 10 by ComfyUI."""
    management = Management()
    monkeypatch.setattr(pins, "comfy", SimpleNamespace(model_management=management))
    monkeypatch.setattr(pins, "_counted_bytes", 0)
    pin(monkeypatch, 40 * MIB)
    management.total += 10 * MIB
    return management


def on_another_thread(call):
    thread = threading.Thread(target=call)
    thread.start()
    thread.join(0.3)
    return thread


@pytest.mark.parametrize("run", [lambda call: call(), on_another_thread], ids=["this thread", "another"])
@pytest.mark.parametrize("then", [30, 70])
def test_a_change_in_the_midst_of_a_count_is_counted_once(run, then, interrupted, monkeypatch):
    """As the garbage collector lets memory go in the middle of anything, and a thread that pins anytime."""
    interrupted.before = lambda: run(lambda: pin(monkeypatch, then * MIB))
    pin(monkeypatch, 20 * MIB)
    assert interrupted.total == (10 + then) * MIB
    assert pins.pin_limit(0)[0] == 90 * MIB


def test_whoever_asks_for_the_limit_sees_no_half_count(interrupted, monkeypatch):
    asked, limits = [], []
    interrupted.after = lambda: asked.append(on_another_thread(lambda: limits.append(pins.pin_limit(0)[0])))
    pin(monkeypatch, 20 * MIB)
    asked[0].join(5)
    assert limits == [90 * MIB]
    assert interrupted.total == 30 * MIB


def test_threads_that_make_and_drop_pins_disturb_no_sum():
    stop = threading.Event()

    def make():
        while not stop.is_set():
            _ = [pinning.Pins() for _ in range(50)]

    makers = [threading.Thread(target=make) for _ in range(2)]
    for maker in makers:
        maker.start()
    try:
        until = time.monotonic() + 1
        while time.monotonic() < until:
            assert pinning.pinned_by_all() >= 0
    finally:
        stop.set()
        for maker in makers:
            maker.join()


@pytest.mark.skipif(not hasattr(comfy.model_management, "TOTAL_PINNED_MEMORY"), reason="this ComfyUI counts no pins")
def test_comfyuis_own_pins_are_counted_where_ours_are(management, monkeypatch):
    """Not a stand-in: it fails if ComfyUI counts elsewhere, or otherwise, than is assumed here."""
    driver = SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(management, "PINNED_MEMORY", {})
    pin(monkeypatch, 40 * MIB)
    weight = torch.nn.Parameter(torch.zeros(MIB, dtype=torch.uint8), requires_grad=False)
    assert management.pin_memory(weight)
    assert counted(management) == 41 * MIB
    assert limit() == 99 * MIB
    assert management.unpin_memory(weight)  # some ComfyUIs set the counter to 0 here
    assert limit() == 100 * MIB
    assert counted(management) == 40 * MIB
