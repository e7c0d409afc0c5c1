"""ComfyUI's own memory manager in charge of streamed models, on a fake device whose memory the test controls.

The fake device is ``cpu:1``: torch computes there as on the CPU, and ComfyUI is told that it is none. What is on it is
what `MeasuredCopies` has handed out and still lives. A short profile runs by default; ``HYPOTHESIS_PROFILE=long`` runs
thousands of steps.
"""

import contextlib
import gc
import inspect
import weakref

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import pytest
import torch
from effort import LONG
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import nn

from flux_nf4.offload import record as record_module
from flux_nf4.offload.comfyui import streaming as streaming_module
from flux_nf4.offload.comfyui.patcher import StreamedModelPatcher
from flux_nf4.offload.comfyui.streaming import attach_streaming
from flux_nf4.offload.copies import InlineCopies
from flux_nf4.offload.plan import Residency

DEVICE = torch.device("cpu", 1)
WIDTH, DOUBLES, SINGLES = 48, 4, 6
STAGING = 40_000
X = torch.linspace(-1, 1, WIDTH).repeat(2, 1)
APPLY_MODEL = comfy.patcher_extension.WrappersMP.APPLY_MODEL


class MeasuredCopies(InlineCopies):
    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.live = 0
        self.room = None

    def empty(self, nbytes):
        if self.room is not None and self.live + nbytes > self.room:
            raise torch.OutOfMemoryError("fake")
        memory = super().empty(nbytes)
        self.live += nbytes
        weakref.finalize(memory, self._freed, nbytes)
        return memory

    def _freed(self, nbytes):
        self.live -= nbytes


class Interrupt(BaseException):
    pass


class Block(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)

    def forward(self, x, failure=None):
        hidden = self.first(x)
        if failure is not None:
            raise failure
        return x + self.second(hidden).tanh()


class Model(nn.Module):
    """As much of ComfyUI's BaseModel as its patcher and the memory manager look at."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.diffusion_model = nn.Module()
        self.diffusion_model.double_blocks = nn.ModuleList(Block(96) for _ in range(DOUBLES))
        self.diffusion_model.single_blocks = nn.ModuleList(Block(40) for _ in range(SINGLES))
        self.diffusion_model.last = nn.Linear(WIDTH, WIDTH)
        self.device = torch.device("cpu")
        self.manual_cast_dtype = None
        self.current_patcher = None
        self.requires_grad_(False)

    @property
    def blocks(self):
        return [*self.diffusion_model.double_blocks, *self.diffusion_model.single_blocks]

    def get_dtype(self):
        return torch.float32

    def forward(self, x, failures=()):
        """``failures``: (index of a block, what it raises), each only once."""
        for index, block in enumerate(self.blocks):
            pending = next((failure for failure in failures if failure[0] == index), None)
            if pending is not None:
                failures.remove(pending)
            x = block(x, pending[1] if pending is not None else None)
        return self.diffusion_model.last(x)


class World:
    """A device, two streamed models with some clones each, and a model of ComfyUI's own."""

    def __init__(self, monkeypatch):
        self.copies = MeasuredCopies()
        self.capacity, self.ballast = 10**7, 0
        management = comfy.model_management
        for name, stand_in in {
            "is_device_cpu": lambda device: device != DEVICE,
            "get_torch_device": lambda: DEVICE,
            "get_all_torch_devices": lambda *_: [DEVICE],
            "get_free_memory": lambda device=None, torch_free_too=False: self.free(device, torch_free_too),
            "minimum_inference_memory": lambda: 20_000,
            "extra_reserved_memory": lambda: 10_000,
            "vram_state": management.VRAMState.NORMAL_VRAM,
            "current_loaded_models": [],
        }.items():
            monkeypatch.setattr(management, name, stand_in, raising=False)
        monkeypatch.setattr(record_module, "SMALL_BYTES", 1024)
        monkeypatch.setattr(StreamedModelPatcher, "staging_bytes", STAGING)
        monkeypatch.setattr(StreamedModelPatcher, "_computes_from_host", False)
        monkeypatch.setattr(streaming_module, "copies_to", lambda device: self.copies)
        self.expected = [Model(seed)(X) for seed in (1, 2)]
        self.clones = [[self.make(seed)] for seed in (1, 2)]
        self.stock_module = Model(3)
        self.stock = comfy.model_patcher.ModelPatcher(self.stock_module, DEVICE, torch.device("cpu"))

    def make(self, seed):
        model = Model(seed)
        attach_streaming(model, {"double": model.blocks[:DOUBLES], "single": model.blocks[DOUBLES:]})
        return StreamedModelPatcher(model, DEVICE, torch.device("cpu"))

    def used(self):
        others = [clones[0].model for clones in self.clones if clones]
        small = sum(model.streaming.other_bytes for model in others if model.model_loaded_weight_memory)
        return self.copies.live + small + self.stock.loaded_size() + self.ballast

    def free(self, device, torch_free_too):
        free = self.capacity - self.used() if device == DEVICE else 10**12
        return (free, free) if torch_free_too else free

    def sample(self, patcher, needed, failures=()):
        comfy.model_management.load_models_gpu([patcher], needed, minimum_memory_required=needed)
        patcher.pre_run()
        try:
            wrappers = patcher.get_all_wrappers(APPLY_MODEL)
            executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(
                patcher.model.forward, patcher.model, wrappers
            )
            return executor.execute(X, list(failures))
        finally:
            patcher.cleanup()
            if failures:
                failures = ()
                gc.collect()  # these exceptions and the frames that they passed hold each other

    def check(self):
        rings = {}
        held = 0
        for clones in self.clones:
            streaming = clones[0].model.streaming
            streamer = streaming.streamer
            held += sum(block.device_bytes for block in streamer.blocks)
            if streamer._ring is not None:
                rings[id(streamer._ring)] = streamer._ring.memory.nbytes
            loaded = clones[0].loaded_size()
            if streamer.plan is None:
                assert (loaded, streamer.device_bytes) == (0, 0)
            else:
                assert loaded == streaming.other_bytes + streamer.device_bytes
                assert streamer.device_bytes == streamer.plan.device_bytes
            hooks = [
                h for b in clones[0].model.blocks for m in b.modules() for h in (m._forward_pre_hooks, m._forward_hooks)
            ]
            assert all(len(of_module) <= 1 for of_module in hooks), "stacked hooks"
        assert self.copies.live == held + sum(rings.values()), "something on the device is not accounted for"


@pytest.fixture
def world(monkeypatch):
    return World(monkeypatch)


def test_two_integers_are_kept_where_there_is_room_and_the_size_is_theirs(world):
    (patcher,) = world.clones[0]
    patcher.residency = Residency((("double", 2), ("single", 1)))
    assert torch.equal(world.sample(patcher, 1000), world.expected[0])
    assert len(patcher.model.streaming.streamer.plan.resident) == 3
    assert patcher.loaded_size() == patcher.model_size()
    world.check()


asks_for_less = pytest.mark.skipif(
    "max(0.1, lowvram_model_memory - loaded_memory)" in inspect.getsource(comfy.model_management.load_models_gpu),
    reason="this ComfyUI (before 0.3.75) never asks a model that is loaded to take less",
)


@asks_for_less
def test_a_big_picture_lowers_residency_and_a_small_one_takes_it_again(world, caplog):
    (patcher,) = world.clones[0]
    patcher.residency = Residency((("double", 3), ("single", 4)))
    streamer = patcher.model.streaming.streamer
    wanted = patcher.model_size()
    world.capacity = wanted + 60_000
    counts = []
    for needed in (30_000, wanted - 50_000, 30_000, wanted - 50_000):
        assert torch.equal(world.sample(patcher, needed), world.expected[0])
        counts.append(len(streamer.plan.resident))
        world.check()
    assert counts[0] == counts[2] == 7
    assert counts[1] == counts[3] < 7
    assert caplog.text.count("there is room for") == 1


@asks_for_less
def test_a_budget_is_kept_and_the_automatic_one_takes_what_there_is(world):
    (patcher,) = world.clones[0]
    full = patcher.model.streaming.streamer.host_bytes
    patcher.residency = Residency(budget_bytes=full // 2)
    world.sample(patcher, 1000)
    assert full // 4 < patcher.loaded_size() <= full // 2
    automatic = patcher.clone()
    automatic.residency = Residency()
    world.sample(automatic, 1000)
    assert not patcher.model.streaming.streamer.plan.streamed
    world.capacity = full // 2
    world.sample(automatic, 1000)
    assert patcher.model.streaming.streamer.plan.streamed
    world.check()


def test_a_budget_that_is_too_small_says_the_least_that_works(world):
    (patcher,) = world.clones[0]
    patcher.residency = Residency(budget_bytes=1000)
    with pytest.raises(ValueError, match="is too small: with every block streamed this model takes"):
        patcher.require_budget()


def test_residents_given_up_are_gone_at_once_and_counted_exactly(world):
    (patcher,) = world.clones[0]
    world.sample(patcher, 1000)
    streamer = patcher.model.streaming.streamer
    for wanted in (1, 30_000, 60_000):
        live = world.copies.live
        freed = patcher.partially_unload(torch.device("cpu"), wanted)
        assert freed == live - world.copies.live >= wanted
        world.check()
        assert torch.equal(patcher.model(X), world.expected[0])
    assert patcher.partially_unload(torch.device("cpu"), 10**9) == 0
    assert streamer.plan is not None


def test_a_model_of_comfyui_takes_room_and_the_streamed_one_goes_on_with_less(world):
    (patcher,) = world.clones[0]
    world.capacity = patcher.model_size() + 250_000
    world.sample(patcher, 10_000)
    before = len(patcher.model.streaming.streamer.plan.resident)
    comfy.model_management.load_models_gpu([world.stock], 1000, minimum_memory_required=1000)
    assert patcher.loaded_size() > 0
    assert len(patcher.model.streaming.streamer.plan.resident) < before
    assert torch.equal(world.stock.model(X), Model(3)(X))
    assert torch.equal(world.sample(patcher, 10_000), world.expected[0])
    world.check()


def out_of_memory(block):
    return (block, torch.OutOfMemoryError("fake"))


def test_out_of_memory_in_a_forward_gives_residents_up_and_runs_it_once_more(world, caplog):
    (patcher,) = world.clones[0]
    output = world.sample(patcher, 1000, [out_of_memory(5)])
    assert torch.equal(output, world.expected[0])
    assert patcher.model.streaming.streamer.plan.resident == ()
    assert "out of memory in Model, so the 10 resident blocks were given up" in caplog.text
    with pytest.raises(torch.OutOfMemoryError):
        world.sample(patcher, 1000, [out_of_memory(5), out_of_memory(6)])
    assert torch.equal(world.sample(patcher, 1000), world.expected[0])
    world.check()


def test_out_of_memory_ends_a_forward_that_can_give_nothing_up(world, monkeypatch):
    (patcher,) = world.clones[0]
    monkeypatch.setattr(streaming_module.Streamer, "change", lambda *_: None)
    with pytest.raises(torch.OutOfMemoryError):
        world.sample(patcher, 1000, [out_of_memory(5)])


def test_a_clone_that_goes_while_another_is_sampled_changes_nothing(world):
    (patcher,) = world.clones[0]
    patcher.residency = Residency((("double", 1), ("single", 1)))
    clone = patcher.clone()
    world.sample(clone, 1000)
    comfy.model_management.load_models_gpu([patcher], 1000, minimum_memory_required=1000)
    held = world.copies.live
    del clone
    gc.collect()
    assert world.copies.live == held
    assert torch.equal(patcher.model(X), world.expected[0])
    world.check()


def test_merging_and_saving_are_refused_with_advice(world):
    (patcher,) = world.clones[0]
    with pytest.raises(ValueError, match="cannot be merged"):
        patcher.add_patches(world.stock.get_key_patches("diffusion_model."), 0.5, 0.5)
    with pytest.raises(ValueError, match="Quantise Flux to NF4 and Save"):
        patcher.state_dict_for_saving()
    with pytest.raises(ValueError, match="Quantise Flux to NF4 and Save"):
        patcher.model.state_dict_for_saving()


models = st.integers(0, 1)
residencies = st.one_of(
    st.just(Residency()),
    st.integers(70_000, 900_000).map(lambda budget: Residency(budget_bytes=budget)),
    st.tuples(st.integers(0, DOUBLES), st.integers(0, SINGLES)).map(
        lambda counts: Residency((("double", counts[0]), ("single", counts[1])))
    ),
)


class Machine(RuleBasedStateMachine):
    @initialize()
    def begin(self):
        self.patches = pytest.MonkeyPatch()
        self.world = World(self.patches)

    def pick(self, model, clone):
        clones = self.world.clones[model]
        return clones[clone % len(clones)]

    @rule(model=models, clone=st.integers(0, 9), needed=st.integers(0, 900_000))
    def sample(self, model, clone, needed):
        output = self.world.sample(self.pick(model, clone), needed)
        assert torch.equal(output, self.world.expected[model])

    @rule(model=models, clone=st.integers(0, 9), block=st.integers(0, 9), times=st.integers(1, 2))
    def run_out_of_memory(self, model, clone, block, times):
        with contextlib.suppress(torch.OutOfMemoryError):
            output = self.world.sample(self.pick(model, clone), 1000, [out_of_memory(block)] * times)
            assert torch.equal(output, self.world.expected[model])

    @rule(model=models, clone=st.integers(0, 9), block=st.integers(0, 9))
    def interrupt(self, model, clone, block):
        with contextlib.suppress(Interrupt):
            self.world.sample(self.pick(model, clone), 1000, [(block, Interrupt())])

    @rule(model=models, clone=st.integers(0, 9), room=st.integers(0, 300_000))
    def find_less_than_comfyui_thought(self, model, clone, room):
        self.world.copies.room = self.world.copies.live + room
        try:
            self.sample(model, clone, 1000)
        except torch.OutOfMemoryError:
            assert self.pick(model, clone).loaded_size() == 0
        finally:
            self.world.copies.room = None

    @rule(model=models, wanted=st.integers(0, 900_000))
    def unload_some(self, model, wanted):
        patcher, live = self.pick(model, 0), self.world.copies.live
        freed = patcher.partially_unload(torch.device("cpu"), wanted)
        assert freed == 0 or freed >= wanted
        assert freed <= live - self.world.copies.live

    @rule()
    def unload_all(self):
        comfy.model_management.unload_all_models()
        assert self.world.copies.live == 0

    @rule(model=models, clone=st.integers(0, 9), residency=residencies)
    def clone(self, model, clone, residency):
        new = self.pick(model, clone).clone()
        new.residency = residency
        self.world.clones[model].append(new)

    @rule(model=models, clone=st.integers(0, 9), residency=residencies)
    def change_settings(self, model, clone, residency):
        self.pick(model, clone).residency = residency

    @rule(model=models, clone=st.integers(0, 9))
    def let_a_clone_go(self, model, clone):
        clones = self.world.clones[model]
        if len(clones) > 1:
            del clones[clone % len(clones)]
            gc.collect()

    @rule()
    def load_a_model_of_comfyui(self):
        comfy.model_management.load_models_gpu([self.world.stock], 1000, minimum_memory_required=1000)

    @rule(ballast=st.integers(0, 400_000), capacity=st.integers(900_000, 2_500_000))
    def others_take_memory(self, ballast, capacity):
        self.world.ballast, self.world.capacity = ballast, capacity

    @invariant()
    def everything_is_accounted_for(self):
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self):
        if hasattr(self, "world"):
            comfy.model_management.unload_all_models()
            self.world.check()
            for clones in self.world.clones:
                clones.clear()
            gc.collect()
            assert self.world.copies.live == 0
            self.patches.undo()


Machine.TestCase.settings = settings(
    max_examples=100 if LONG else 8,
    stateful_step_count=40 if LONG else 20,
    phases=[Phase.reuse, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
TestMachine = Machine.TestCase
