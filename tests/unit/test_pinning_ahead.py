"""Pinning on a thread: what it is to do counts, each copy waits for its own piece, and none waits for what is over."""

import gc
import sys
import threading
import time
import weakref

import pytest
import torch
from blocks_of_a_file import ALL, BLOCKS, DEVICE, PAGES, arena_of
from fake_registrar import FakeRegistrar, GatedRegistrar, pinned_parts
from file_parts import Part, maps_of, open_files

from flux_nf4.offload import file_arena, pinning, pinning_ahead
from flux_nf4.offload.arena import PAGE, HostArena
from flux_nf4.offload.file_arena import FileArena
from flux_nf4.offload.file_map import map_parts
from flux_nf4.offload.pinning import pinned_by_all
from flux_nf4.offload.pinning_ahead import until_registered

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no file is pinned")


@pytest.fixture(autouse=True)
def _all_is_over_in_the_end(ram):
    yield
    assert pinning_ahead._thread is None
    assert pinning_ahead._pending == {}


def source(arena, index):
    """Bytes in the middle of a block."""
    return arena.tensors[index][0][7:90]


def waits_for(tensor):
    """A thread that waits for the memory of ``tensor``, and should."""
    thread = threading.Thread(target=until_registered, args=([tensor],), daemon=True)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    return thread


def ends(thread):
    thread.join(10)
    return not thread.is_alive()


def test_what_is_to_be_registered_counts_from_the_start(file, monkeypatch):
    counted = []
    monkeypatch.setattr(pinning, "pins_changed", lambda: counted.append(pinned_by_all()))
    registrar = GatedRegistrar()
    arena = arena_of(file, registrar)
    arena.pin_ahead(ALL, DEVICE)
    assert registrar.registered == {}
    assert counted == [ALL]
    assert arena.all_pinned
    assert arena.pinned_bytes == pinned_by_all() == ALL
    registrar.let(BLOCKS)
    pinning_ahead.wait()
    assert set(counted) == {ALL}
    assert sum(registrar.registered.values()) == ALL
    arena.unpin()
    assert registrar.registered == {}
    assert counted[-1] == 0


def test_each_waits_for_its_own_piece_and_for_no_other(file):
    registrar = GatedRegistrar(let=1)
    arena = arena_of(file, registrar)
    arena.pin_ahead(ALL, DEVICE)
    until_registered([source(arena, 0)])
    third, second = waits_for(source(arena, 2)), waits_for(source(arena, 1))
    registrar.let(1)
    assert ends(second)
    assert third.is_alive()
    assert len(registrar.registered) == 2
    registrar.let(2)
    assert ends(third)
    pinning_ahead.wait()


def test_it_stands_still_while_it_is_paused(file):
    """As long as anybody wants it."""
    registrar = GatedRegistrar(let=1)
    arena = arena_of(file, registrar)
    arena.pin_ahead(ALL, DEVICE)
    until_registered([source(arena, 0)])
    with pinning_ahead.paused():
        with pinning_ahead.paused():
            registrar.let(BLOCKS)
            time.sleep(0.05)
        time.sleep(0.05)
        assert len(registrar.registered) <= 2, "what it had begun, and no more"
    pinning_ahead.wait()
    assert len(registrar.registered) == BLOCKS


def test_who_waits_for_a_piece_comes_before_who_has_paused_it(file):
    registrar = GatedRegistrar(let=1)
    arena = arena_of(file, registrar)
    arena.pin_ahead(ALL, DEVICE)
    until_registered([source(arena, 0)])
    with pinning_ahead.paused():
        registrar.let(BLOCKS)
        until_registered([source(arena, BLOCKS - 1)])
        assert len(registrar.registered) == BLOCKS


@pytest.mark.parametrize("end", [pinning_ahead.wait, pinning_ahead.stop])
def test_who_ends_it_does_not_wait_for_who_has_paused_it(file, end):
    registrar = GatedRegistrar(let=BLOCKS)
    arena = arena_of(file, registrar)
    with pinning_ahead.paused():  # nothing is under way
        pass
    arena.pin_ahead(ALL, DEVICE)
    with pinning_ahead.paused():
        end()
        assert pinning_ahead._thread is None
        until_registered([source(arena, 0)])


def test_nobody_waits_for_memory_that_is_not_to_be_registered(file):
    registrar = GatedRegistrar()
    arena = arena_of(file, registrar)
    arena.pin_ahead(ALL, DEVICE)
    until_registered([torch.zeros(3)])
    until_registered([HostArena([PAGE]).records[0]])
    registrar.let(BLOCKS)
    pinning_ahead.wait()


def test_pinning_does_not_wait_and_is_said_once_when_it_is_over(file, messages):
    registrar = GatedRegistrar(let=1)
    arena = arena_of(file, registrar)
    arena.pin_ahead(ALL, DEVICE)
    until_registered([source(arena, 0)])
    for _ in range(2):
        arena.pin(ALL, DEVICE)
        assert messages() == []
    assert len(registrar.registered) == 1
    registrar.let(BLOCKS - 1)
    pinning_ahead.wait()
    arena.pin(ALL, DEVICE)
    ((level, text),) = messages()
    assert level == "INFO"
    assert text.endswith("GiB of the file pinned")
    assert registrar.calls == BLOCKS


def test_other_memory_is_pinned_meanwhile(file):
    registrar, theirs = GatedRegistrar(), FakeRegistrar()
    arena, host = arena_of(file, registrar), HostArena([PAGE, PAGE], theirs)
    arena.pin_ahead(ALL, DEVICE)
    host.pin(2 * ALL, DEVICE)
    assert sum(theirs.registered.values()) == 2 * PAGE
    registrar.let(BLOCKS)
    pinning_ahead.wait()


def test_a_refusal_in_the_middle_lets_all_go_and_is_said(file, messages):
    registrar = GatedRegistrar(refuse_at=2, let=1)
    arena = arena_of(file, registrar)
    arena.pin_ahead(ALL, DEVICE)
    arena.pin(ALL, DEVICE)
    waiting = [waits_for(source(arena, index)) for index in (2, 3)]
    registrar.let(2)
    assert all(map(ends, waiting))
    pinning_ahead.wait()
    assert registrar.calls == 3, "the refusal ends it"
    assert pinned_parts(arena) == [True, True, False, False]
    assert pinned_by_all() == 2 * PAGES
    registrar.let(1)
    arena.pin(ALL, DEVICE)
    assert registrar.calls == 4, "it is tried again"
    ((level, text),) = messages()
    assert level == "WARNING"
    assert "of the file pinned; the driver refused more (error 2), so some copies are slower. Close" in text
    arena.unpin()
    assert registrar.registered == {}


def test_a_refusal_before_anybody_pins_is_said_by_whoever_does(file, messages):
    arena = arena_of(file, FakeRegistrar(refuse_at=2))
    arena.pin_ahead(ALL, DEVICE)
    pinning_ahead.wait()
    assert messages() == []
    arena.pin(ALL, DEVICE)
    ((level, text),) = messages()
    assert level == "WARNING"
    assert "the driver refused more (error 2)" in text


class FailingRegistrar(GatedRegistrar):
    def register(self, pointer, nbytes, *, read_only=False):
        if self.calls == 1:
            self.calls += 1
            raise RuntimeError("the device has left")
        return super().register(pointer, nbytes, read_only=read_only)


def test_a_driver_that_raises_lets_all_go_and_is_said_and_tried_again(file, messages):
    registrar = FailingRegistrar()
    arena = arena_of(file, registrar)
    arena.pin_ahead(ALL, DEVICE)
    arena.pin(ALL, DEVICE)
    waiting = waits_for(source(arena, 3))
    registrar.let(BLOCKS)
    assert ends(waiting)
    pinning_ahead.wait()
    assert pinned_by_all() == arena.pinned_bytes == PAGES
    ((level, text),) = messages()
    assert level == "WARNING"
    assert "of the file pinned; the driver failed (the device has left), so some copies are slower." in text
    arena.pin(ALL, DEVICE)
    assert arena.all_pinned
    assert [level for level, _ in messages()] == ["INFO"]


def test_comfyui_is_told_by_whoever_pins_next_that_less_is_pinned(file, monkeypatch):
    counted = []
    monkeypatch.setattr(pinning, "pins_changed", lambda: counted.append(pinned_by_all()))
    arena = arena_of(file, FakeRegistrar(refuse_at=1))
    arena.pin_ahead(ALL, DEVICE)
    while pinning_ahead._pending:
        time.sleep(0.001)
    arena.pin(ALL, DEVICE)
    assert (counted[0], counted[-1]) == (ALL, PAGES)


def test_told_to_stop_it_ends_with_the_piece_that_it_is_at(file, monkeypatch):
    registrar = GatedRegistrar()
    arena = arena_of(file, registrar)
    arena.pin_ahead(ALL, DEVICE)
    waiting = waits_for(source(arena, 3))

    def wait(wait=pinning_ahead.wait):
        registrar.let(BLOCKS)
        wait()

    with monkeypatch.context() as patch:
        patch.setattr(pinning_ahead, "wait", wait)
        pinning_ahead.stop()
    assert ends(waiting)
    assert registrar.calls == 1
    assert pinned_by_all() == PAGES
    arena.unpin()
    assert registrar.registered == {}


def test_whoever_unpins_waits_until_it_is_over(file):
    registrar = GatedRegistrar()
    arena = arena_of(file, registrar)
    arena.pin_ahead(ALL, DEVICE)
    threading.Timer(0.05, registrar.let, [BLOCKS]).start()
    arena.unpin()
    assert registrar.calls == BLOCKS
    assert registrar.registered == {}
    assert pinned_by_all() == 0


class CollectingRegistrar(FakeRegistrar):
    """Unpins, as the garbage collector does when it finds a model, on the thread that registers."""

    def register(self, *arguments, **options):
        if self.calls == 1:
            self.__dict__.pop("arena").unpin()
        return super().register(*arguments, **options)


def test_unpinned_by_the_garbage_collector_of_its_own_thread_it_is_so_in_the_end(file):
    registrar = CollectingRegistrar()
    arena = registrar.arena = arena_of(file, registrar)
    arena.pin_ahead(ALL, DEVICE)
    pinning_ahead.wait()
    assert registrar.calls == BLOCKS
    assert registrar.registered == {}
    assert pinned_by_all() == 0


def test_unpinned_by_the_garbage_collector_just_before_it_begins_it_is_so_in_the_end(file, monkeypatch):
    registrar = FakeRegistrar()
    arena = arena_of(file, registrar)
    begin = threading.Thread.start

    def collect_and_begin(thread):
        arena.unpin()
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", collect_and_begin)
    arena.pin_ahead(ALL, DEVICE)
    pinning_ahead.wait()
    assert registrar.calls == BLOCKS
    assert registrar.registered == {}


def test_a_file_that_is_forgotten_meanwhile_is_unregistered_before_it_is_unmapped(file):
    registrar = GatedRegistrar()
    arena = arena_of(file, registrar)
    arena.pin_ahead(ALL, DEVICE)
    del arena
    gc.collect()
    assert len(maps_of(file)) == BLOCKS
    registrar.let(BLOCKS)
    pinning_ahead.wait()
    gc.collect()
    assert registrar.calls == BLOCKS
    assert registrar.registered == {}
    assert maps_of(file) == open_files(file) == []


def test_nothing_is_kept_when_it_is_over_though_nobody_waits(file):
    registrar = GatedRegistrar()
    arena = arena_of(file, registrar)
    arena.pin_ahead(ALL, DEVICE)
    arena.pin(ALL, DEVICE)  # will be said by the thread
    thread = pinning_ahead._thread
    registrar.let(BLOCKS)
    assert ends(thread)
    gone = weakref.ref(arena)
    del thread, arena
    assert gone() is None
    assert registrar.registered == {}


def test_what_another_arena_has_pinned_ahead_is_unpinned_by_the_last_user(file):
    registrar = FakeRegistrar()
    arena = arena_of(file, registrar)
    arena_of(file, registrar).pin_ahead(ALL, DEVICE)
    thread = pinning_ahead._thread  # keeps no arena
    pinning_ahead.wait()
    arena.pin(ALL, DEVICE)
    arena.unpin()
    assert registrar.registered == {}
    assert thread is None or ends(thread)


def test_where_no_thread_is_to_be_had_whoever_pins_does_it(file, monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    registrar = FakeRegistrar()
    arena = arena_of(file, registrar)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    arena.pin_ahead(ALL, DEVICE)
    assert pinned_by_all() == 0
    until_registered([source(arena, 0)])
    arena.pin(ALL, DEVICE)
    assert arena.all_pinned


def test_one_at_a_time(file):
    registrar = GatedRegistrar()
    first, second = arena_of(file, registrar), FileArena([map_parts([Part(file, ALL, PAGE)])], registrar)
    first.pin_ahead(2 * ALL, DEVICE)
    threading.Timer(0.05, registrar.let, [BLOCKS + 1]).start()
    second.pin_ahead(2 * ALL, DEVICE)
    assert registrar.calls >= BLOCKS
    pinning_ahead.wait()
    assert second.all_pinned
    assert len(registrar.registered) == BLOCKS + 1


@pytest.mark.parametrize("short", ["limit", "room"])
def test_what_may_not_all_be_pinned_is_not_pinned_ahead(file, short, ram):
    registrar = FakeRegistrar()
    arena = arena_of(file, registrar)
    if short == "room":
        ram(ALL - 1)
    arena.pin_ahead(ALL - 1 if short == "limit" else ALL, DEVICE)
    pinning_ahead.wait()
    assert registrar.calls == 0
    assert pinned_by_all() == 0


def test_a_user_that_goes_meanwhile_waits_for_nothing_and_all_is_unpinned_in_the_end(file):
    """The garbage collector may end it anywhere, also where the thread that registers waits for a lock."""

    class User:
        pass

    registrar = GatedRegistrar()
    arena, users = arena_of(file, registrar), [User()]
    arena.keep_pinned_for(users[0])
    arena.pin_ahead(ALL, DEVICE)
    goes = threading.Thread(target=users.clear, daemon=True)
    goes.start()
    assert ends(goes)
    registrar.let(BLOCKS)
    pinning_ahead.wait()
    assert registrar.registered == {}
    assert pinned_by_all() == 0


@pytest.mark.parametrize(("needed", "begins"), [(0, True), (1, False)])
def test_ram_that_is_still_to_be_filled_is_not_pinned(needed, begins, file, monkeypatch):
    monkeypatch.setattr(file_arena, "_room_for_pins", lambda: ALL)
    registrar = GatedRegistrar(let=BLOCKS)
    arena = arena_of(file, registrar)
    arena.pin_ahead(ALL, DEVICE, needed)
    pinning_ahead.wait()
    assert bool(registrar.registered) is begins
    arena.unpin()
