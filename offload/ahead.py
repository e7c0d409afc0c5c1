"""Outputs of layers computed ahead of the forwards that need them, while the layers' weights are on the device.

The input of some layers is only a small vector that depends on the timestep (Flux.1's modulation: 27 % of its blocks'
bytes). The vectors of the coming forwards can be predicted, so a layer that is called computes its outputs for all of
them. Until these are used up, its weights take neither device memory nor the bus. Where the weights stay on the device
(`Ahead.weights_stay`) nothing is gained by that, and each forward computes its own outputs.

Each output is computed in a call of its own and counts only for a vector with the same bits and shape, so it has the
bits that the layer would compute now. If an output is missing, after an interrupt for instance, the layer computes it
when it is called.

Only the device knows which vector a forward has. If the host waits for that at the first layer, it also waits for all
that the device still has to do, and then the device waits for the host. So where the last forwards were those that were
expected, the host guesses, and learns at the end of the forward whether it was right (`Ahead.guessing`). If it was not,
what the forward has given is thrown away, it runs again, and until `Ahead.forget` the host waits.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

AHEAD = 12
"""The most forwards computed at once. For one forward, Flux.1's outputs take 2.1 MB for each row of the vector."""

MOST_ROWS = 4 * AHEAD
"""The most rows of vectors whose outputs are kept at once: two batches of 2, for instance."""

ENOUGH = 3
"""So many forwards in a row have to be as expected before the host guesses, of each prompt that runs by itself.
Samplers that evaluate some steps twice, or between two steps, do not come so far."""

Foretell = Callable[[torch.Tensor, int], Sequence[torch.Tensor] | None]
"""Predicts from the vector of this forward at most so many vectors of the coming ones; None if it does not know it."""


class SeveralInputs(nn.Module):
    """A layer that is called with several inputs at once, so that its weights are brought to the device once.

    To a streamer it is a block, and the streamer's hooks bring the weights. The layer stays a part of its model.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self._compute: Callable[[nn.Module, torch.Tensor], Any] = type(layer).forward

    def forward(self, inputs: Sequence[torch.Tensor]) -> list[Any]:
        """The layer's output for each input, computed one after the other."""
        return [self.one(each) for each in inputs]

    def one(self, input: torch.Tensor) -> Any:
        """The layer's output, for which its weights must be there: no hook of this block brings them."""
        return self._compute(self.layer, input)


@dataclass(eq=False)
class _Forward:
    """A vector (rows, features) and the layers' outputs for it, by layer; None for an output that is not computed."""

    vector: torch.Tensor
    outputs: list[Any]


class _Run:
    """Consecutive forwards. Those before ``now`` are over and keep no outputs."""

    def __init__(self, forwards: Sequence[_Forward]) -> None:
        self.forwards = forwards
        self.bits = torch.stack([bits_of(forward.vector) for forward in forwards])
        self.now = 0

    @property
    def kept_rows(self) -> int:
        return sum(len(forward.vector) for forward in self.forwards[self.now :])

    @property
    def is_used_up(self) -> bool:
        return self.now == len(self.forwards) - 1

    def reach(self, index: int) -> None:
        """Forward ``index`` is the present one."""
        self.now = index
        for forward in self.forwards[:index]:
            forward.outputs = [None] * len(forward.outputs)


class Guesses:
    """What a forward has taken for granted."""

    def __init__(self) -> None:
        self._answers: list[tuple[torch.Tensor, torch.Event | None]] = []

    def add(self, is_right: torch.Tensor) -> None:
        """``is_right`` (bool, a scalar) will be computed where the vector is. The host does not wait."""
        answer, there = is_right.to("cpu", non_blocking=True), None
        if is_right.is_cuda:
            there = torch.Event(is_right.device)
            there.record(torch.accelerator.current_stream(is_right.device.index))
        self._answers.append((answer, there))

    def clear(self) -> None:
        """The forward has failed, and begins again."""
        self._answers.clear()

    def are_right(self) -> bool:
        """Whether all are. The host waits until the device has come to the layers."""
        for _, there in self._answers:
            if there is not None:
                there.synchronize()
        return all(bool(answer) for answer, _ in self._answers)


class Ahead:
    """Makes ``layers``, each called as ``layer(vector)``, return outputs that were computed ahead, if there are any.

    It must live as long as the layers are used. ``blocks`` are what a streamer streams, one for each layer.

    Args:
        layers: In the order in which a forward calls them.
        foretell: See `Foretell`.
        lasting: A context in which memory that outlives a forward is allocated.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        foretell: Foretell,
        lasting: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.weights_stay = False
        """The weights are on the device in any case: a forward computes its own outputs, and the host does not wait."""
        self._guesses: Guesses | None = None
        self.company: tuple[int, bool] | None = None
        """What a user of this has found out about a model, by its id, until `forget`: see `offload.comfyui.company`."""
        self.blocks = tuple(SeveralInputs(layer) for layer in layers)
        self.modules = frozenset(module for layer in layers for module in layer.modules())
        self._foretell = foretell
        self._lasting = lasting
        self.forget()
        for index, layer in enumerate(layers):
            layer.forward = _diverted(_Place(weakref.ref(self), index))

    def begin(self) -> None:
        """A forward begins. Within it, the same vector is always the same object."""
        self._vector: torch.Tensor | None = None

    def forget(self) -> None:
        """Drop all outputs: weights or patches may change, or a sampling is over. Idempotent."""
        self._runs: list[_Run] = []
        """The one that was used last is the last."""
        self._run: _Run | None = None
        self._as_expected = 0
        """How many forwards in a row were the ones that were expected; -1: none is guessed any more."""
        self.company = None
        self.begin()

    @property
    def may_guess(self) -> bool:
        """Whether the next forward might guess, if it may run again."""
        return self._as_expected >= ENOUGH and not self.weights_stay

    @contextmanager
    def guessing(self) -> Iterator[Guesses]:
        """For a forward that can run again: it has to if a guess was wrong. See `was_wrong`."""
        before, self._guesses = self._guesses, Guesses()
        try:
            yield self._guesses
        finally:
            self._guesses = before

    def begin_again(self) -> None:
        """The forward has failed, and runs once more within the same `guessing`."""
        if self._guesses is not None:
            self._guesses.clear()

    def was_wrong(self) -> None:
        """A guess was wrong: there are no more until `forget`."""
        self._as_expected = -1

    def output(self, index: int, vector: torch.Tensor) -> Any:
        """The output of layer ``index`` for ``vector`` (rows, features)."""
        if self.weights_stay:
            return self.blocks[index].one(vector)
        if torch.is_grad_enabled() or not vector.is_contiguous():
            return self.blocks[index]((vector,))[0]
        if vector is not self._vector:
            self._run = self._run_of(vector)
            self._vector = vector
        run = self._run
        assert run is not None
        output = run.forwards[run.now].outputs[index]
        return self._compute(index, run) if output is None else output

    def _compute(self, index: int, run: _Run) -> Any:
        """Compute the outputs of layer ``index`` for this and the coming forwards. Returns the output for this one."""
        missing = [forward for forward in run.forwards[run.now :] if forward.outputs[index] is None]
        with self._lasting():
            outputs = self.blocks[index]([forward.vector for forward in missing])
        for forward, output in zip(missing, outputs, strict=True):
            forward.outputs[index] = output
        return outputs[0]

    def _run_of(self, vector: torch.Tensor) -> _Run:
        """The run that has a forward of ``vector``, at that forward: one that is kept, or a new one."""
        alike = [run for run in self._runs if _are_alike(run.forwards[0].vector, vector)]
        if not alike:
            return self._new_run(vector)
        expected = None if alike[0].is_used_up else (alike[0], alike[0].now + 1)
        is_enough = self._as_expected >= ENOUGH * len(alike)
        if expected is not None and self._guesses is not None and is_enough and _can_wait(vector):
            run, index = expected
            self._guesses.add((run.bits[index] == bits_of(vector)).all())
            return self._reach(run, index)
        found = self._find(alike, vector)
        self._count(found == expected, nothing_expected=found is None and expected is None)
        return self._new_run(vector) if found is None else self._reach(*found)

    def _count(self, as_expected: bool, *, nothing_expected: bool) -> None:
        if self._as_expected < 0:
            return
        if nothing_expected:  # a run is used up: the next forward may be another prompt's, whose run is used up, too
            self._as_expected = min(self._as_expected, ENOUGH - 1)
        else:
            self._as_expected = self._as_expected + 1 if as_expected else 0

    def _find(self, runs: Sequence[_Run], vector: torch.Tensor) -> tuple[_Run, int] | None:
        """The forward of ``vector``: its run, and its index there. The host waits."""
        known = torch.cat([run.bits for run in runs])
        found = (known == bits_of(vector)).all(1).tolist()
        for run in runs:
            mine, found = found[: len(run.forwards)], found[len(run.forwards) :]
            if True in mine:
                return run, mine.index(True)
        return None

    def _reach(self, run: _Run, index: int) -> _Run:
        run.reach(index)
        self._runs.remove(run)
        self._runs.append(run)
        return run

    def _new_run(self, vector: torch.Tensor) -> _Run:
        self._runs = [run for run in self._runs if not run.is_used_up]
        room = MOST_ROWS - sum(run.kept_rows for run in self._runs)
        count = min(AHEAD, room // len(vector))
        coming = self._foretell(vector, count - 1) if count > 0 else None
        with self._lasting():
            # The caller's vector may be memory that a captured graph writes again.
            vectors = [one.clone() for one in (vector, *(coming or ())) if _are_alike(one, vector)]
            run = _Run([_Forward(one, [None] * len(self.blocks)) for one in vectors])
        if coming is not None:
            self._runs.append(run)
        return run


def bits_of(vector: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, (nbytes,) uint8: equal numbers may have other bits (0.0 and -0.0)."""
    return vector.view(torch.uint8).view(-1)


def _can_wait(vector: torch.Tensor) -> bool:
    """Whether the host can wait for what is computed on the vector's device, later."""
    return vector.is_cpu or (vector.is_cuda and hasattr(torch, "accelerator"))


def _are_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


class _Place:
    """A layer of an `Ahead`. It is an object because blocks share compiled code only if nothing else differs."""

    def __init__(self, ahead: "weakref.ref[Ahead]", index: int) -> None:
        self.ahead = ahead
        self.index = index


def _output(place: _Place, vector: torch.Tensor) -> Any:
    ahead = place.ahead()
    assert ahead is not None, "it lives as long as its layers are used"
    return ahead.output(place.index, vector)


_output_uncompiled: Callable[[_Place, torch.Tensor], Any] = torch.compiler.disable(_output)


def _diverted(place: _Place) -> Callable[[torch.Tensor], Any]:
    # Weak: otherwise layer and `Ahead` hold each other, and the weights live until the garbage collector runs.
    def forward(vec: torch.Tensor) -> Any:
        # Where nothing is compiled, the wrapper would take longer than the call.
        return (_output_uncompiled if torch.compiler.is_compiling() else _output)(place, vec)

    return forward
