"""The ladder of a file's memory: pinned where it is, as far as driver, limit and RAM go, and given back by the last."""

import gc
import logging
import os
import sys

import pytest
import torch
from blocks_of_a_file import ALL, BLOCKS, DEVICE, PAGES, arena_of
from fake_registrar import FakeRegistrar, pinned_parts
from file_parts import Part, maps_of, open_files

from flux_nf4.offload import file_arena
from flux_nf4.offload.arena import PAGE
from flux_nf4.offload.file_arena import FileArena, why_not_pinned
from flux_nf4.offload.file_map import FileMapError, map_parts
from flux_nf4.offload.pinning import pinned_by_all

MIB = 1 << 20
OTHER = torch.device("cuda", 1)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no file is pinned")


@pytest.fixture(autouse=True)
def _room(ram):
    """There is enough of it, unless a test says otherwise."""


def test_every_block_is_registered_once_though_neighbours_share_pages(file):
    registrar = FakeRegistrar()
    arena = arena_of(file, registrar)
    arena.pin(ALL, DEVICE)
    assert sorted(registrar.registered.values()) == [PAGES] * BLOCKS
    assert arena.all_pinned
    assert arena.pinned_bytes == arena.nbytes == pinned_by_all() == ALL


def test_what_matters_most_is_first(file):
    registrar = FakeRegistrar(refuse_at=2)
    arena = arena_of(file, registrar)
    arena.pin(ALL, DEVICE, first=(3, 1))
    assert pinned_parts(arena) == [False, True, False, True]


@pytest.mark.parametrize("count", range(BLOCKS))
def test_ram_that_is_not_there_is_not_pinned(file, count, ram, caplog):
    registrar = FakeRegistrar()
    arena = arena_of(file, registrar)
    ram((count + 1) * PAGES - 1)
    arena.pin(ALL, DEVICE)
    assert arena.pinned_bytes == count * PAGES
    assert registrar.calls == count
    assert "GiB of the file pinned; the RAM has no room for more, so some copies are slower" in caplog.text
    ram(1 << 40)
    arena.pin(ALL, DEVICE)
    assert arena.all_pinned


def test_what_is_pinned_of_files_is_not_free(monkeypatch, file):
    monkeypatch.setattr(file_arena, "free_ram_bytes", lambda: ALL + PAGE)  # the system counts it as that still
    arena, other = arena_of(file, FakeRegistrar()), FileArena([map_parts([Part(file, ALL, PAGE)])], FakeRegistrar())
    arena.pin(2 * ALL, DEVICE)
    assert arena.all_pinned
    other.pin(2 * ALL, DEVICE)
    assert other.pinned_bytes == 0


def test_a_limit_below_the_room_is_what_is_said(file, caplog):
    arena = arena_of(file, FakeRegistrar())
    with caplog.at_level(logging.INFO):
        arena.pin(PAGES, DEVICE)
    assert arena.pinned_bytes == PAGES
    assert "that is the limit" in caplog.text


def test_two_arenas_of_a_file_share_its_pins_and_the_last_gives_them_back(file):
    registrar = FakeRegistrar()
    first, second = arena_of(file, registrar), arena_of(file, registrar)
    first.pin(ALL, DEVICE)
    second.pin(ALL, OTHER)
    assert registrar.calls == BLOCKS
    assert pinned_by_all() == second.pinned_bytes == ALL
    first.unpin()
    first.unpin()
    assert second.all_pinned
    second.unpin()
    assert registrar.registered == {}
    assert registrar.log[BLOCKS:][:3] == ["synchronise", "synchronise", "unregister"], "copies to both devices are done"


def test_what_is_pinned_for_a_device_needs_no_more_until_it_is_given_back(file):
    registrar = FakeRegistrar()
    first, second = arena_of(file, registrar), arena_of(file, registrar)
    first.pin(PAGES, DEVICE)
    assert not first.is_pinned_for(DEVICE), "a limit was in the way"
    first.pin(ALL, DEVICE)
    assert first.is_pinned_for(DEVICE)
    assert not first.is_pinned_for(OTHER), "who gives back has to wait for copies to both"
    assert not second.is_pinned_for(DEVICE), "the first may give back what both use"
    second.pin(ALL, DEVICE)
    first.unpin()
    assert first.all_pinned
    assert not first.is_pinned_for(DEVICE)
    assert second.is_pinned_for(DEVICE)


def test_a_view_that_is_left_keeps_the_pages_registered_and_the_last_gives_all_back(file):
    registrar = FakeRegistrar()
    tensors = [map_parts([Part(file, 100, PAGE)])]
    arena = FileArena(tensors, registrar)
    arena.pin(ALL, DEVICE)
    view = tensors[0][0][7:9]
    del tensors, arena
    gc.collect()
    assert len(registrar.registered) == 1
    del view
    assert registrar.registered == {}
    assert maps_of(file) == open_files(file) == []
    assert pinned_by_all() == 0


def test_fifty_loads_leave_nothing_registered(tmp_path):
    registrar = FakeRegistrar()
    for index in range(50):
        path = tmp_path / f"{index}.safetensors"
        path.write_bytes(bytes(ALL * 2))
        arena = arena_of(path, registrar)
        with arena.bringing_in() as brought_in:
            brought_in.wait(lambda _: None)
        arena.pin(1 << 40, DEVICE)
        assert arena.all_pinned
    del arena
    gc.collect()
    assert registrar.registered == {}
    assert pinned_by_all() == 0
    assert open_files(path) == []


def test_bringing_in_tells_how_much_there_is(file):
    told = []
    arena = arena_of(file, FakeRegistrar())
    with arena.bringing_in() as brought_in:
        brought_in.wait(told.append)
    assert sum(told) == arena.bytes_to_bring_in > 0


def test_a_file_that_was_written_to_is_named(file):
    arena = arena_of(file, FakeRegistrar())
    arena.require_unchanged()
    os.truncate(file, PAGE)
    with pytest.raises(FileMapError, match=r"^flux\.safetensors: it was written to"):
        arena.require_unchanged()


def test_a_file_that_can_be_pinned_leaves_nothing_of_the_trial(file):
    registrar = FakeRegistrar()
    assert why_not_pinned(file, DEVICE, registrar) == ""
    assert registrar.log == ["register", "synchronise", "unregister"]
    assert maps_of(file) == open_files(file) == []


def test_each_refusal_says_why(file, monkeypatch):
    assert "error 801" in why_not_pinned(file, DEVICE, FakeRegistrar(knows_read_only=False))
    assert "error 2" in why_not_pinned(file, DEVICE, FakeRegistrar(refuse_at=0))
    assert why_not_pinned(file, torch.device("xpu", 0)) == "xpu has no way to pin memory that is there already"
    assert "cannot be opened" in why_not_pinned(file.parent / "none", DEVICE, FakeRegistrar())
    monkeypatch.setattr(sys, "platform", "win32")
    assert why_not_pinned(file, DEVICE, FakeRegistrar()) == "only Linux pins the memory of a file"
