"""The pinning ladder: whatever the driver, the limit or a flag refuse, the arena works, says so, and gives all back."""

import mmap
import os
import weakref
from pathlib import Path

import pytest
import torch
from fake_registrar import FakeRegistrar, pinned_parts
from own_python import run_script

from flux_nf4.offload import arena as arena_module
from flux_nf4.offload import pinning
from flux_nf4.offload.arena import PAGE, HostArena
from flux_nf4.offload.pinnable import Shortfall
from flux_nf4.offload.pinning import CudaRegistrar, registrar_for

DEVICE = torch.device("cuda", 0)
SIZES = [3 * PAGE, PAGE + 1, 100, 2 * PAGE]
PAGES = [3 * PAGE, 2 * PAGE, PAGE, 2 * PAGE]
ALL = sum(PAGES)


@pytest.fixture(autouse=True)
def _only_this_test_pins(monkeypatch):
    monkeypatch.setattr(pinning, "_all_pins", weakref.WeakSet())


@pytest.fixture(autouse=True)
def _every_record_is_a_piece(monkeypatch):
    monkeypatch.setattr(arena_module, "PIECE_BYTES", 1)


def test_records_are_whole_pages_apart_writable_and_of_exact_size():
    arena = HostArena(SIZES)
    assert [record.nbytes for record in arena.records] == SIZES
    assert all(record.data_ptr() % PAGE == 0 for record in arena.records)
    assert arena.nbytes == ALL
    for value, record in enumerate(arena.records):
        record.fill_(value + 1)
    assert [int(record.unique()) for record in arena.records] == [1, 2, 3, 4]


def test_every_record_is_registered_at_its_size_in_pages(messages):
    registrar = FakeRegistrar()
    arena = HostArena(SIZES, registrar)
    assert not arena.all_pinned
    arena.pin(ALL, DEVICE)
    assert registrar.registered == {r.data_ptr(): n for r, n in zip(arena.records, PAGES, strict=True)}
    assert arena.all_pinned
    assert arena.pinned_bytes == arena.nbytes == ALL
    assert all(pinned_parts(arena))
    ((level, text),) = messages()
    assert level == "INFO"
    assert text.endswith("GiB of host memory pinned")


def test_small_records_are_registered_together_and_large_ones_alone(monkeypatch):
    monkeypatch.setattr(arena_module, "PIECE_BYTES", 3 * PAGE)
    registrar = FakeRegistrar()
    arena = HostArena([PAGE, 0, 2 * PAGE, 3 * PAGE, PAGE - 1, 100, 0], registrar)
    starts = [record.data_ptr() for record in arena.records]
    arena.pin(1 << 40, DEVICE)
    assert registrar.registered == {starts[0]: 3 * PAGE, starts[3]: 3 * PAGE, starts[4]: 2 * PAGE}
    assert pinned_parts(arena) == [True, False, True, True, True, True, False]
    assert arena.pinned_bytes == arena.nbytes == 8 * PAGE
    del arena
    assert registrar.registered == {}


def test_pinning_what_is_pinned_does_nothing_and_says_nothing(messages):
    registrar = FakeRegistrar()
    arena = HostArena(SIZES, registrar)
    arena.pin(ALL, DEVICE)
    messages()
    arena.pin(ALL, DEVICE)
    arena.pin(0, DEVICE)
    assert registrar.calls == 4
    assert arena.all_pinned
    assert messages() == []


@pytest.mark.parametrize("refuse_at", range(4))
def test_the_first_refusal_ends_it_and_what_is_pinned_stays(refuse_at, messages):
    registrar = FakeRegistrar(refuse_at)
    arena = HostArena(SIZES, registrar)
    arena.pin(ALL, DEVICE)
    assert registrar.calls == refuse_at + 1
    assert arena.pinned_bytes == sum(PAGES[:refuse_at])
    assert pinned_parts(arena) == [index < refuse_at for index in range(4)]
    assert not arena.all_pinned
    ((level, text),) = messages()
    assert level == "WARNING"
    assert "the driver refused more (error 2), so some copies are slower. Close other programs" in text
    assert "ulimit -l" in text


def test_pinning_again_after_a_refusal_goes_on_from_there(messages):
    registrar = FakeRegistrar(refuse_at=2)
    arena = HostArena(SIZES, registrar)
    arena.pin(ALL, DEVICE)
    arena.pin(ALL, DEVICE)
    assert len(messages()) == 1, "the same thing is said once"
    registrar.refuse_at = None
    arena.pin(ALL, DEVICE)
    assert arena.all_pinned
    ((level, _),) = messages()
    assert level == "INFO"


LIMITED = Shortfall("no more is allowed", "Allow more.")


@pytest.mark.parametrize("count", range(4))
@pytest.mark.parametrize("missing", [1, 100])
def test_a_limit_is_never_passed(count, missing, messages):
    registrar = FakeRegistrar()
    arena = HostArena(SIZES, registrar)
    arena.pin(sum(PAGES[: count + 1]) - missing, DEVICE, LIMITED)
    assert registrar.calls == count
    assert arena.pinned_bytes == sum(PAGES[:count])
    ((level, text),) = messages()
    assert level == "WARNING"
    assert text.endswith("pinned; no more is allowed, so some copies are slower. Allow more.")


def test_a_raised_limit_goes_on_from_there():
    registrar = FakeRegistrar()
    arena = HostArena(SIZES, registrar)
    for count in (1, 3, 4):
        arena.pin(sum(PAGES[:count]), DEVICE)
        assert registrar.calls == count
        assert arena.pinned_bytes == sum(PAGES[:count])


def test_all_arenas_share_one_limit():
    registrar = FakeRegistrar()
    first, second = HostArena(SIZES, registrar), HostArena(SIZES, registrar)
    limit = ALL + sum(PAGES[:2])
    first.pin(limit, DEVICE)
    second.pin(limit, DEVICE)
    assert first.all_pinned
    assert second.pinned_bytes == sum(PAGES[:2])
    del first
    second.pin(limit, DEVICE)
    assert second.all_pinned


def test_nothing_is_registered_where_pinning_is_forbidden(messages):
    registrar = FakeRegistrar()
    arena = HostArena(SIZES, registrar)
    arena.pin(0, DEVICE, LIMITED)
    arena.unpin()
    del arena
    assert registrar.log == []
    assert "0.00 of" in messages()[0][1]


@pytest.mark.parametrize("device", ["cpu", "xpu", "mps"])
def test_a_device_that_cannot_register_is_told_once(device, messages):
    arena = HostArena(SIZES)
    for _ in range(3):
        arena.pin(ALL, torch.device(device))
    assert arena.pinned_bytes == 0
    ((level, text),) = messages()
    assert level == "INFO"
    assert device in text


def test_unpinning_gives_all_back_after_the_last_copy_and_can_be_followed_by_pinning():
    registrar = FakeRegistrar()
    arena = HostArena(SIZES, registrar)
    for _ in range(2):
        registrar.log.clear()
        arena.pin(ALL, DEVICE)
        arena.unpin()
        arena.unpin()
        assert registrar.log == ["register"] * 4 + ["synchronise"] + ["unregister"] * 4
        assert arena.pinned_bytes == 0
        assert registrar.registered == {}


def test_what_is_pinned_goes_back_once_with_the_arena():
    registrar = FakeRegistrar(refuse_at=3)
    arena = HostArena(SIZES, registrar)
    arena.pin(ALL, DEVICE)
    del arena
    assert registrar.log[3:] == ["synchronise"] + ["unregister"] * 3
    assert registrar.registered == {}


def test_nothing_is_unregistered_while_a_view_is_left():
    """A copy under way holds one."""
    registrar = FakeRegistrar()
    arena = HostArena(SIZES, registrar)
    arena.pin(ALL, DEVICE)
    view = arena.records[1][5:10].view(torch.uint8)
    gone = weakref.ref(arena)
    del arena
    assert gone() is None
    assert len(registrar.registered) == 4
    del view
    assert registrar.registered == {}


def test_every_device_that_copies_is_waited_for():
    registrars = {}
    arena = HostArena(SIZES, lambda device: registrars.setdefault(device, FakeRegistrar()))
    other = torch.device("cuda", 1)
    arena.pin(PAGES[0], DEVICE)
    registrars[other] = registrars[DEVICE]
    arena.pin(ALL, other)
    arena.unpin()
    assert registrars[DEVICE].log[-6:] == ["synchronise"] * 2 + ["unregister"] * 4


class FakeRuntime:
    """``torch.cuda`` with a driver that returns ``error``."""

    def __init__(self, error):
        self.error = error
        self.calls = []

    def cudart(self):
        return self

    def device(self, device):
        return torch.no_grad()  # any context will do

    def cudaHostRegister(self, *arguments):
        self.calls.append(arguments)
        return self.error

    def synchronize(self, device):
        self.calls.append(device)
        raise RuntimeError("CUDA error: the pending one")


@pytest.mark.parametrize("error", [0, 1, 2, 801])
def test_a_refusal_leaves_no_pending_error(error, monkeypatch):
    runtime = FakeRuntime(error)
    monkeypatch.setattr(torch, "cuda", runtime)
    launched = []
    monkeypatch.setattr(torch, "ones", lambda *_, device: launched.append(device) or torch.zeros(1))
    assert CudaRegistrar(DEVICE).register(PAGE, 2 * PAGE) == error
    assert runtime.calls == [(PAGE, 2 * PAGE, 0), *([DEVICE] if error else [])]
    assert launched == ([DEVICE] if error else [])


def test_a_files_map_is_registered_read_only(monkeypatch):
    runtime = FakeRuntime(0)
    monkeypatch.setattr(torch, "cuda", runtime)
    monkeypatch.setattr(torch.version, "hip", None)
    assert CudaRegistrar(DEVICE).register(PAGE, 2 * PAGE, read_only=True) == 0
    assert runtime.calls == [(PAGE, 2 * PAGE, 8)]


def test_rocm_where_the_flag_means_something_else_is_not_asked(monkeypatch):
    runtime = FakeRuntime(0)
    monkeypatch.setattr(torch, "cuda", runtime)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert CudaRegistrar(DEVICE).register(PAGE, 2 * PAGE, read_only=True) == 801
    assert runtime.calls == []


def test_cuda_and_only_cuda_registers():
    assert isinstance(registrar_for(DEVICE), CudaRegistrar)
    assert registrar_for(torch.device("xpu", 0)) is None


PINNED_ARENA = """
    from fake_registrar import FakeRegistrar
    from flux_nf4.offload import arena
    from flux_nf4.offload.arena import PAGE, HostArena

    arena.PIECE_BYTES = PAGE
    registrar = FakeRegistrar()
    arena = HostArena([PAGE, PAGE], registrar)
    arena.pin(2 * PAGE, torch.device("cuda", 0))
"""


def test_a_fork_unregisters_nothing():
    """Whether it unpins, drops the arena or just ends."""
    out = run_script(
        PINNED_ARENA,
        """
        for leave in (lambda: arena.unpin(), lambda: globals().pop("arena"), sys.exit):
            child = os.fork()
            if child == 0:
                registrar.unregister = lambda pointer: print("unregistered")
                leave()
                sys.exit()
            assert os.waitpid(child, 0)[1] == 0
            print(len(registrar.registered))
        del arena
        print(len(registrar.registered))
    """,
    )
    assert out == ["2", "2", "2", "0"]


def test_at_exit_all_goes_back_once():
    out = run_script(
        PINNED_ARENA,
        """
        registrar.unregister = lambda pointer: print(registrar.registered.pop(pointer) // PAGE)
    """,
    )
    assert out == ["1", "1"]


def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def test_a_kernel_without_huge_pages_is_no_fault(monkeypatch):
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345)  # the system answers EINVAL
    assert [record.nbytes for record in HostArena(SIZES).records] == SIZES


def test_the_memory_goes_back_to_the_system():
    registrar = FakeRegistrar()
    before = resident_mib()
    arena = HostArena([50_000_000] * 4, registrar)
    assert resident_mib() < before + 20, "memory is taken when it is written"
    for record in arena.records:
        record.fill_(1)
    arena.pin(2**40, DEVICE)
    assert resident_mib() > before + 180
    del record, arena
    assert resident_mib() < before + 20
