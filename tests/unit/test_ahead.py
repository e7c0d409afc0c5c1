"""Outputs that are computed ahead: used only for the bits that they were computed from, and right after anything."""

import contextlib
import gc
import weakref

import pytest
import torch
from torch import nn

from flux_nf4.offload import ahead as ahead_module
from flux_nf4.offload.ahead import AHEAD, ENOUGH, Ahead


class Layer(nn.Module):
    """Counts its calls, each of which has an input."""

    def __init__(self, factor):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(float(factor)), requires_grad=False)
        self.inputs = []

    def forward(self, vec):
        self.inputs.append(vec.clone())
        return vec * self.weight


class World:
    """Two layers, and a schedule of vectors: the forward of each foretells those after it."""

    def __init__(self, count=20, rows=1):
        torch.manual_seed(0)
        self.schedule = [torch.randn(rows, 4) for _ in range(count)]
        self.layers = [Layer(2), Layer(3)]
        self.ahead = Ahead(self.layers, self.foretell)

    def foretell(self, vector, most):
        found = [index for index, one in enumerate(self.schedule) if torch.equal(one, vector)]
        return self.schedule[found[0] + 1 :][:most] if found else None

    def forward(self, vector):
        """Whether the outputs are right, and how many inputs each layer has seen since the last forward."""
        vector, outputs = self.outputs(vector)
        counts = [len(layer.inputs) for layer in self.layers]
        for layer, output in zip(self.layers, outputs, strict=True):
            layer.inputs.clear()
            assert torch.equal(output, vector * layer.weight)
        return counts

    def outputs(self, vector):
        vector = vector.clone()
        self.ahead.begin()
        with torch.inference_mode():
            return vector, [layer(vector) for layer in self.layers]

    def guessed(self, vector):
        """Of a forward that may guess: whether it has, whether it was right, and whether the outputs are."""
        with self.ahead.guessing() as guesses:
            vector, outputs = self.outputs(vector)
        is_right, has_guessed = guesses.are_right(), bool(guesses._answers)
        if not is_right:
            self.ahead.was_wrong()
        right = [torch.equal(output, vector * layer.weight) for layer, output in zip(self.layers, outputs, strict=True)]
        return has_guessed, is_right, all(right)


@pytest.fixture
def world():
    return World()


def test_the_first_of_the_foretold_forwards_computes_all_of_them(world):
    counts = [world.forward(vector) for vector in world.schedule]
    expected = [[0, 0]] * len(counts)
    expected[0], expected[AHEAD] = [AHEAD, AHEAD], [len(counts) - AHEAD] * 2
    assert counts == expected


def test_a_vector_of_other_bits_is_computed(world):
    world.schedule = [torch.zeros(1, 4), torch.ones(1, 4)]
    assert world.forward(torch.zeros(1, 4)) == [2, 2]
    assert world.forward(-torch.zeros(1, 4)) == [2, 2], "its bits are others"
    assert world.forward(torch.full((1, 4), 0.5)) == [1, 1]


@pytest.mark.parametrize("other", [torch.ones(2, 4), torch.ones(1, 4, dtype=torch.float64)], ids=["rows", "dtype"])
def test_a_vector_of_another_shape_or_dtype_is_computed_by_itself(other, world):
    world.forward(world.schedule[0])
    assert world.forward(other) == [1, 1]
    assert world.forward(world.schedule[1]) == [0, 0]


def test_each_vector_is_computed_in_a_call_of_its_own_and_of_its_shape():
    world = World(rows=2)
    with torch.inference_mode():
        world.layers[0](world.schedule[0])
    assert [tuple(vector.shape) for vector in world.layers[0].inputs] == [(2, 4)] * AHEAD


def test_what_is_missing_is_computed_when_it_is_called(world):
    world.ahead.begin()
    with torch.inference_mode():
        world.layers[0](world.schedule[0].clone())
    world.layers[0].inputs.clear()
    assert world.forward(world.schedule[0]) == [0, AHEAD]
    assert world.forward(world.schedule[3]) == [0, 0]
    assert world.forward(world.schedule[1]) == [2, 2], "what is over is not kept"


def test_after_forgetting_other_weights_count(world):
    world.forward(world.schedule[0])
    world.layers[0].weight.fill_(7.0)
    world.ahead.forget()
    world.forward(world.schedule[1])


def test_no_more_rows_are_kept_than_there_is_room_for(world, monkeypatch):
    monkeypatch.setattr(ahead_module, "MOST_ROWS", AHEAD + 2)
    other = World()
    world.forward(world.schedule[0])
    both, world.schedule = world.schedule, [vector + 1 for vector in other.schedule]
    assert world.forward(world.schedule[0]) == [2, 2]
    assert world.forward(world.schedule[2]) == [1, 1]
    assert world.forward(both[1]) == [0, 0]


def test_what_outlives_a_forward_is_in_lasting_memory_and_the_callers_own_is_not_kept():
    world = World()
    depth, made = [], []

    @contextlib.contextmanager
    def lasting():
        depth.append(1)
        yield
        depth.pop()

    class Noting(torch.Tensor):
        """Notes where its clones and its products are made."""

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function in (torch.Tensor.clone, torch.Tensor.mul):
                made.append((function.__name__, bool(depth)))
            return super().__torch_function__(function, types, args, kwargs or {})

    world.ahead = Ahead(world.layers, world.foretell, lasting)
    for layer in world.layers:
        layer.inputs = _Nothing()
    vector = world.schedule[0].clone().as_subclass(Noting)
    world.ahead.begin()
    with torch.inference_mode():
        outputs = [layer(vector) for layer in world.layers]
    assert set(made) == {("clone", True), ("mul", True)}
    wanted = [output.clone() for output in outputs]
    vector.zero_()
    world.ahead.begin()
    with torch.inference_mode():
        again = [layer(world.schedule[0].clone()) for layer in world.layers]
    assert all(map(torch.equal, again, wanted))
    assert all(output is one for output, one in zip(again, outputs, strict=True)), "it is kept"


class _Nothing(list):
    def append(self, _):
        """Keep nothing."""


WAITED, GUESSED, MISTAKEN = (False, True, True), (True, True, True), (True, False, False)


def test_after_some_forwards_as_expected_the_host_guesses(world):
    found = [world.guessed(vector) for vector in world.schedule]
    first = ENOUGH + 1
    expected = first * [WAITED] + (len(found) - first) * [GUESSED]
    expected[AHEAD] = expected[AHEAD + 1] = WAITED  # the first is not foretold yet, and may be another prompt's
    assert found == expected


def test_a_wrong_guess_is_told_and_is_the_last_until_it_forgets(world):
    for vector in world.schedule[: ENOUGH + 2]:
        world.guessed(vector)
    assert world.guessed(world.schedule[10]) == MISTAKEN
    assert world.guessed(world.schedule[10]) == WAITED
    assert [world.guessed(vector) for vector in world.schedule[6:12]] == 6 * [WAITED]
    world.ahead.forget()
    assert [world.guessed(vector) for vector in world.schedule[: ENOUGH + 2]] == [*(ENOUGH + 1) * [WAITED], GUESSED]


HEUNPP2 = (0, 1, 2, 1, 2, 3, 2, 3, 4)


@pytest.mark.parametrize(
    "indices", [(0, 1, 1, 2, 2, 3, 3, 4), (0, 2, 1, 3, 2, 4, 3), (0, 0, 0, 0, 0), HEUNPP2], ids=str
)
def test_of_forwards_that_come_otherwise_none_is_guessed(indices, world):
    assert [world.guessed(world.schedule[index]) for index in indices] == len(indices) * [WAITED]


def test_two_prompts_in_turn_are_guessed_each(world):
    other = [vector + 1 for vector in world.schedule]
    schedules, world.foretell = (world.schedule, other), None
    world.ahead._foretell = lambda vector, most: next(
        one[index + 1 :][:most] for one in schedules for index, each in enumerate(one) if torch.equal(each, vector)
    )
    found = [world.guessed(vector) for both in zip(*schedules, strict=True) for vector in both]
    first = 2 + 2 * ENOUGH
    assert found[: first + 3] == [WAITED] * first + [GUESSED] * 3
    assert found[2 * AHEAD :][: first + 3] == [WAITED] * first + [GUESSED] * 3
    assert all(is_right and fits for _, is_right, fits in found)


def test_a_forward_that_cannot_run_again_guesses_nothing(world):
    for vector in world.schedule[:5]:
        world.guessed(vector)
    for layer in world.layers:
        layer.inputs.clear()
    assert world.forward(world.schedule[7]) == [0, 0]


def test_the_host_does_not_ask_while_it_guesses(world, monkeypatch):
    for vector in world.schedule[:5]:
        world.guessed(vector)
    monkeypatch.setattr(world.ahead, "_find", lambda *_: pytest.fail("the host waits here"))
    assert world.guessed(world.schedule[5]) == GUESSED


def test_where_the_weights_stay_each_forward_computes_its_own(world, monkeypatch):
    world.ahead.weights_stay = True
    monkeypatch.setattr(world.ahead, "_run_of", lambda _: pytest.fail("the host waits here"))
    assert [world.forward(vector) for vector in world.schedule[:3]] == [[1, 1]] * 3


def test_gradients_are_those_of_the_layer(world):
    world.layers[0].weight.requires_grad_(True)
    for _ in range(2):
        vector = world.schedule[0].clone().requires_grad_(True)
        world.layers[0](vector).sum().backward()
        assert torch.equal(vector.grad, torch.full((1, 4), 2.0))


def test_layers_do_not_keep_what_they_are_diverted_to(world):
    gc.disable()
    try:
        gone = weakref.ref(world.ahead)
        del world.ahead
        assert gone() is None
    finally:
        gc.enable()
