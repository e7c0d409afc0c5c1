"""Layers and blocks that are called in other ways than by a plain forward: same bits, and the bus as before.

Layers of the model fail where a tensor of theirs is not on the device.
"""

import pytest
import torch
from simulated_device import SimulatedDevice
from streaming_model import StreamedModel, Value
from torch import nn

from flux_nf4.offload import record as record_module
from flux_nf4.offload.copies import InlineCopies
from flux_nf4.offload.plan import plan_for
from flux_nf4.offload.streamer import Streamer


@pytest.fixture(autouse=True)
def _small_blocks_are_streamed(monkeypatch):
    monkeypatch.setattr(record_module, "SMALL_BYTES", 128)


@pytest.fixture
def model():
    model = StreamedModel(Streamer, SimulatedDevice())
    model.start()
    return model


def bytes_a_forward(model, forward=None):
    """Once it is steady."""
    forward = forward or model.forward
    for _ in range(3):
        forward()
    before = model.device.copied_bytes
    for _ in range(4):
        forward()
    model.check()
    return (model.device.copied_bytes - before) / 4


def layer_of(model, block, number):
    """The ``number``-th layer that the block calls."""
    layers = model.blocks[block].layers
    return layers[len(layers) - 1 - number]


def call(model, block, number):
    layer_of(model, block, number)(Value(torch.arange(4.0)))


def forward_with(model, calls):
    """A forward with layers called out of turn: ``calls`` has (block, layer) by the block before which that is."""

    def forward():
        model.calls += 1
        x = Value(torch.arange(4.0) + model.calls)
        expected = Value(x.tensor)
        for index in range(len(model.blocks) + 1):
            for block, number in calls.get(index, ()):
                call(model, block, number)
            if index < len(model.blocks):
                x, expected = model.blocks[index](x), model.reference[index](expected)
        model.pending.append((x, expected.tensor))

    return forward


OUT_OF_TURN = {
    "before": {0: [(0, 0)]},
    "before, the last layer": {0: [(0, 2)]},
    "between": {4: [(0, 0)]},
    "between, of the next block": {4: [(4, 0)]},
    "after": {8: [(0, 1)]},
    "before, between and after": {0: [(0, 0)], 3: [(1, 1)], 8: [(7, 0)]},
    "two at once": {5: [(2, 0), (6, 1)]},
}


@pytest.mark.parametrize("calls", OUT_OF_TURN.values(), ids=OUT_OF_TURN.keys())
def test_a_layer_called_out_of_turn_costs_what_is_fetched_for_it_and_nothing_afterwards(model, calls):
    plain = StreamedModel(Streamer, SimulatedDevice())
    plain.start()
    usual = bytes_a_forward(plain)
    assert usual == plain.streamer.plan.bytes_per_forward
    during = bytes_a_forward(model, forward_with(model, calls))
    count = sum(map(len, calls.values()))
    assert during - usual <= count * 3 * model.streamer.plan.staging_bytes
    assert bytes_a_forward(model) == usual


@pytest.mark.parametrize("calls", OUT_OF_TURN.values(), ids=OUT_OF_TURN.keys())
def test_a_forward_is_counted_once_whatever_is_called_out_of_turn(model, calls):
    forward = forward_with(model, calls)
    for _ in range(6):
        forward()
    model.streamer.telemetry.rest()
    model.check()
    assert model.streamer.telemetry.forwards == 6


@pytest.mark.parametrize("stop_before", range(1, 3))
def test_a_first_forward_cut_short_in_its_first_block_leaves_the_bus_as_it_is(model, stop_before):
    model.forward(stop_at=0, stop_before=stop_before)
    assert bytes_a_forward(model) == model.streamer.plan.bytes_per_forward


def test_skipped_blocks_cost_nothing_afterwards(model):
    for _ in range(3):
        model.forward(order=[0, 2, 3, 5, 7])
    assert bytes_a_forward(model) == model.streamer.plan.bytes_per_forward


def test_a_forward_that_skips_blocks_or_calls_each_twice_is_one_forward(model):
    twice = [index for index in range(8) for _ in range(2)]
    for order in ([0, 2, 3, 5, 7], twice, [1, 2, 3, 4], twice, range(8)):
        model.forward(order=order)
    model.streamer.telemetry.rest()
    model.check()
    assert model.streamer.telemetry.forwards == 5


@pytest.mark.parametrize(("double", "single"), [(3, 3), (2, 5), (2, 4)])
def test_forwards_over_few_streamed_blocks_are_counted(double, single):
    model = StreamedModel(Streamer, SimulatedDevice())
    model.start(double, single)
    for _ in range(4):
        model.forward()
    model.streamer.telemetry.rest()
    model.check()
    assert model.streamer.telemetry.forwards == 4


@pytest.mark.parametrize("steps", [2, 3, 4, 5, 9])
def test_what_few_steps_cost_is_what_the_plan_says(model, steps):
    for _ in range(steps):
        model.forward()
    model.streamer.telemetry.rest()
    model.check()
    telemetry = model.streamer.telemetry
    assert telemetry.forwards == steps
    assert telemetry.last_timed.copied_bytes == model.streamer.plan.bytes_per_forward
    assert telemetry.last_timed.refetched == 0


def test_the_order_that_was_learned_outlives_a_change_of_plan(model):
    model.forward()
    model.start(double=1)
    for _ in range(2):
        model.forward()
        model.check()
    assert model.streamer.telemetry.last.refetched == 0


def test_a_model_that_changes_the_order_of_its_layers_is_followed(model):
    usual = bytes_a_forward(model)
    for block in (*model.blocks, *model.reference):
        block.layers = nn.ModuleList(reversed(block.layers))
    assert bytes_a_forward(model) == usual
    assert model.streamer.telemetry.last.refetched == 0


class OwnBlock(nn.Module):
    """Another package's module with the layers of a block, put in its place."""

    def __init__(self, block):
        super().__init__()
        self.layers = block.layers
        self.compute = type(block).forward

    def forward(self, *args):
        return self.compute(self, *args)


class CallsForward(nn.Module):
    """Another package's module around a block, whose forward it calls without its hooks."""

    def __init__(self, block):
        super().__init__()
        self.__dict__["block"] = block

    def forward(self, *args):
        return self.block.forward(*args)


@pytest.fixture(params=[False, True], ids=["layers", "whole blocks"])
def streamed(request):
    model = StreamedModel(Streamer, SimulatedDevice())
    sizes = model.streamer.sizes(whole_blocks=request.param)
    model.streamer.start(plan_for(sizes, (1, 6), 2400), model.device, whole_blocks=request.param)
    return model


@pytest.mark.parametrize("by", [OwnBlock, CallsForward])
@pytest.mark.parametrize("which", [(0,), (1, 2), range(8)], ids=str)
def test_layers_that_another_module_calls_are_on_the_device(streamed, by, which):
    originals = list(streamed.blocks)
    for _ in range(2):
        streamed.blocks = [by(block) if index in which else block for index, block in enumerate(originals)]
        streamed.forward()
        streamed.blocks = originals
        streamed.forward()
    streamed.check()


def test_a_block_that_runs_another_one_in_its_midst_goes_on_with_its_own_layers(streamed):
    for blocks in (streamed.blocks, streamed.reference):
        inner, x = blocks[2], Value(torch.arange(4.0))
        for outer in (blocks[0], blocks[1]):
            outer.layers[1].register_forward_hook(lambda *_, inner=inner, x=x: inner(x))
    for _ in range(3):
        streamed.forward()
    streamed.check()


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.two(self.one(x).tanh())


class OwnTwoLayers(TwoLayers):
    """Another package's module with the layers of a block."""

    def __init__(self, block):
        nn.Module.__init__(self)
        self.one, self.two = block.one, block.two


class Once(InlineCopies):
    """Copies what the host memory had when this was made, which is then overwritten: who reads it there computes 0."""

    def __init__(self, arena):
        super().__init__(torch.device("cpu"))
        self._saved = [(memory.data_ptr(), memory.clone()) for memory in arena.records]
        for memory in arena.records:
            memory.zero_()

    def copy(self, pairs, **events):
        super().copy([(destination, self._as_saved(source)) for destination, source in pairs], **events)

    def _as_saved(self, source):
        start, saved = max((pair for pair in self._saved if pair[0] <= source.data_ptr()), key=lambda pair: pair[0])
        return saved[source.data_ptr() - start :][: source.nbytes]


@pytest.mark.parametrize("by", [lambda block: block, OwnTwoLayers], ids=["block", "own block"])
@pytest.mark.parametrize("first", [(0, 1, 2), (1,), ()], ids=str)
def test_what_was_compiled_under_one_plan_is_right_under_the_next(by, first, monkeypatch):
    """Compiled code is kept for layers that had no hook when one comes to them."""
    monkeypatch.setattr(record_module, "SMALL_BYTES", 64)
    torch.compiler.reset()
    torch.manual_seed(0)
    blocks, x = [TwoLayers() for _ in range(3)], torch.randn(2, 16)
    expected = [block(x) for block in blocks]
    streamer = Streamer({"double": blocks})
    copies = Once(streamer.arena)
    compiled = [torch.compile(by(block), backend="eager") for block in blocks]
    sizes = streamer.sizes(whole_blocks=True)
    for resident in (first, (), (0,), (0, 1, 2), ()):
        streamer.start(plan_for(sizes, resident, 0), copies, whole_blocks=True)
        assert all(torch.equal(run(x), wanted) for run, wanted in zip(compiled, expected, strict=True))
    streamer.stop()
    assert not any(layer._forward_pre_hooks for block in blocks for layer in block.modules())
