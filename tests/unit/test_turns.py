"""Threads that take turns: one at a time, whoever has waited longest, and never for ever."""

import threading
import time

import pytest
import torch
from torch import nn

from flux_nf4.offload import turns as module
from flux_nf4.offload.turns import Turns

LONG_S = 20.0


class Threads:
    """Threads that each run a function, and what they have written down."""

    def __init__(self, turns):
        self.turns = turns
        self.log = []
        self._threads = []

    def start(self, function, *arguments):
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        thread.start()
        self._threads.append(thread)

    def until_waiting(self, count):
        """Return when so many threads wait for their turn."""
        for _ in range(int(LONG_S / 0.001)):
            if len(self.turns._waiting) == count:
                return
            time.sleep(0.001)
        raise AssertionError(f"{len(self.turns._waiting)} threads wait, not {count}")

    def join(self):
        for thread in self._threads:
            thread.join(LONG_S)
            assert not thread.is_alive()


@pytest.fixture
def threads():
    return Threads(Turns(patience_s=LONG_S))


def forward(threads, name, blocks):
    with threads.turns.taken():
        for block in range(blocks):
            threads.turns.pass_on()
            threads.log.append((name, block))


def test_threads_alternate_block_by_block(threads):
    with threads.turns.taken():
        for count, name in enumerate("ab", 1):
            threads.start(forward, threads, name, 3)
            threads.until_waiting(count)
    threads.join()
    assert threads.log == [(name, block) for block in range(3) for name in "ab"]


def test_only_one_runs_at_a_time(threads):
    inside, most = [], []

    def busy():
        for _ in range(50):
            with threads.turns.taken():
                for _ in range(2):
                    inside.append(1)
                    most.append(len(inside))
                    time.sleep(0.0001)
                    inside.pop()
                    threads.turns.pass_on()

    for _ in range(4):
        threads.start(busy)
    threads.join()
    assert most == [1] * 400


def test_a_forward_that_fails_gives_its_turn_to_the_next(threads):
    def fail():
        with threads.turns.taken():
            threads.start(forward, threads, "next", 1)
            threads.until_waiting(1)
            raise ValueError("no room")

    with pytest.raises(ValueError, match="no room"):
        fail()
    threads.join()
    assert threads.log == [("next", 0)]
    assert threads.turns._holder is None


def test_a_forward_in_a_forward_keeps_the_turn(threads):
    turns = threads.turns

    def outer():
        with turns.taken():
            with turns.taken():
                pass
            threads.start(forward, threads, "other", 1)
            threads.until_waiting(1)
            threads.log.append("still the outer one")

    threads.start(outer)
    threads.join()
    assert threads.log == ["still the outer one", ("other", 0)]


class Interrupted:
    """A lock, at whose second `acquire` the thread would wait."""

    def __init__(self):
        self._calls = 0

    def acquire(self, timeout=0.0):
        self._calls += 1
        if self._calls == 2:
            raise KeyboardInterrupt

    def release(self):
        pass


@pytest.mark.parametrize("where", ["before its first block", "at a block"])
def test_who_is_interrupted_while_it_waits_is_left_out(threads, where, monkeypatch):
    turns = threads.turns
    has_turn, may_end = threading.Event(), threading.Event()

    def other():
        with turns.taken():
            has_turn.set()
            may_end.wait(LONG_S)
            threads.log.append(turns._has_it)

    def interrupted():
        with turns.taken():
            threads.start(other)
            threads.until_waiting(1)
            monkeypatch.setattr(module, "Lock", Interrupted)
            turns.pass_on()

    def interrupted_at_once():
        threads.start(other)
        assert has_turn.wait(LONG_S)
        monkeypatch.setattr(module, "Lock", Interrupted)
        with turns.taken():
            raise AssertionError("it has had its turn")

    with pytest.raises(KeyboardInterrupt):
        (interrupted if where == "at a block" else interrupted_at_once)()
    monkeypatch.undo()
    assert not turns._waiting
    assert has_turn.wait(LONG_S)
    may_end.set()
    threads.join()
    assert threads.log == [True], "whoever had the turn meanwhile keeps it"
    assert turns._holder is None


def test_a_thread_without_the_turn_passes_nothing_on(threads):
    with threads.turns.taken():
        threads.start(forward, threads, "waits", 1)
        threads.until_waiting(1)
        outside = threading.Thread(target=threads.turns.pass_on, daemon=True)
        outside.start()
        outside.join(LONG_S)
        assert not outside.is_alive()
        assert threads.turns._has_it
        assert len(threads.turns._waiting) == 1
    threads.join()


def test_who_waits_too_long_goes_on_without_a_turn():
    threads = Threads(Turns(patience_s=0.01))
    with threads.turns.taken():
        threads.start(forward, threads, "impatient", 3)
        threads.join()
        assert threads.log == [("impatient", block) for block in range(3)]
        assert threads.turns._has_it
        assert not threads.turns._waiting
    assert threads.turns._holder is None


def test_a_forward_that_waits_for_another_thread_s_forward_comes_to_its_end():
    threads = Threads(Turns(patience_s=0.01))

    def outer():
        with threads.turns.taken():
            inner = threading.Thread(target=forward, args=(threads, "inner", 1), daemon=True)
            inner.start()
            inner.join(LONG_S)
            threads.log.append("outer")

    threads.start(outer)
    threads.join()
    assert threads.log == [("inner", 0), "outer"]


def test_compiled_code_has_no_break_for_it(threads):
    """Compiled in a thread that has the turn, while another one waits."""
    block, graphs = nn.Linear(4, 4), []
    block.register_forward_pre_hook(threads.turns.pass_on)

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    with threads.turns.taken():
        threads.start(forward, threads, "waits", 1)
        threads.until_waiting(1)
        torch.compile(block, backend=backend, fullgraph=True)(torch.zeros(1, 4))
    threads.join()
    assert len(graphs) == 1
