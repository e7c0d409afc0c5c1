"""Output never depends on residency: ComfyUI samples, our patcher streams on a CPU "device" that counts its copies."""

import gc
import weakref

import comfy.model_management
import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from tiny_blocks import DOUBLES, SINGLES

from flux_nf4.offload.comfyui import streaming
from flux_nf4.offload.comfyui.patcher import StreamedModelPatcher
from flux_nf4.offload.plan import Residency
from flux_nf4.offload.telemetry import Telemetry


@pytest.fixture
def expected(load, sample):
    """Latents of the model whose blocks compute straight from host memory."""
    return sample(load())


@pytest.mark.parametrize("double", [0, 1, DOUBLES - 1, DOUBLES])
@pytest.mark.parametrize("single", [0, 1, SINGLES - 1, SINGLES])
def test_every_pair_of_block_counts_gives_the_same_latents(double, single, load, sample, expected, copies):
    patcher = load(double, single)
    streamer = patcher.model.streaming.streamer
    sample(patcher, steps=1)
    plan = streamer.plan
    kinds = [size.kind for size in streamer.sizes()]
    assert bool(plan.streamed) == (double < DOUBLES or single < SINGLES - 1), "one single block is less than a ring"
    if plan.streamed:
        assert sum(kinds[i] == "double" for i in plan.resident) == min(double, DOUBLES)
        assert sum(kinds[i] == "single" for i in plan.resident) == min(single, SINGLES)
    copies.nbytes = 0
    assert torch.equal(sample(patcher, steps=2), expected)
    modulation = sum(size.streamed for size in patcher.model.streaming.modulation.streamer.sizes())
    passes = 1 if plan.streamed else 0  # once for both steps
    assert copies.nbytes == 2 * plan.bytes_per_forward + passes * modulation
    assert plan.bytes_per_forward == sum(streamer.sizes()[i].streamed for i in plan.streamed)
    assert streamer.device_bytes == plan.device_bytes


def test_sampling_writes_nothing_to_host_memory(load, sample, copies):
    patcher = load(1, 1)
    records = patcher.model.streaming.streamer.arena.records
    before = [record.clone() for record in records]
    sample(patcher)
    assert all(torch.equal(record, was) for record, was in zip(records, before, strict=True))


class Interrupt(BaseException):
    """As ComfyUI's own: raised from inside any layer."""


@pytest.mark.parametrize("block", [0, DOUBLES - 1, DOUBLES, DOUBLES + SINGLES - 1])
def test_an_interrupted_run_leaves_the_next_one_equal(block, load, sample, expected, copies):
    patcher = load(1, 2)
    transformer = patcher.model.diffusion_model
    layer = [*transformer.double_blocks, *transformer.single_blocks][block]
    inner = layer.img_mlp[2] if hasattr(layer, "img_mlp") else layer.linear2

    def interrupt(*_):
        raise Interrupt

    handle = inner.register_forward_pre_hook(interrupt)
    with pytest.raises(Interrupt):
        sample(patcher)
    handle.remove()
    assert torch.equal(sample(patcher), expected)


def test_changed_block_counts_take_effect_without_reading_the_file_again(load, sample, expected, copies):
    patcher = load(0, 0)
    streamer = patcher.model.streaming.streamer
    sample(patcher)
    hooks = len(streamer._conveyor._hooks)
    for double, single in ((1, 3), (2, SINGLES), (0, 2), (0, 0)):
        changed = patcher.clone()
        changed.residency = Residency((("double", double), ("single", single)))
        assert torch.equal(sample(changed), expected)
        assert streamer.plan == changed.plan
        patcher = changed
    assert len(streamer._conveyor._hooks) == hooks


def test_two_clones_with_their_own_settings_can_be_sampled_in_turn(load, sample, expected, copies):
    first = load(0, 0)
    second = first.clone()
    second.residency = Residency((("double", 3), ("single", 4)))
    for _ in range(2):
        for patcher in (first, second):
            assert torch.equal(sample(patcher), expected)
            assert patcher.model.streaming.streamer.plan == patcher.plan


def test_the_size_that_comfyui_sees_is_what_is_on_the_device(load, sample, copies):
    patcher = load(2, 3)
    streaming = patcher.model.streaming
    sample(patcher)
    assert patcher.model_size() == streaming.other_bytes + streaming.streamer.device_bytes
    assert patcher.loaded_size() == patcher.model_size()
    comfy.model_management.unload_all_models()
    assert streaming.streamer.device_bytes == 0
    assert patcher.loaded_size() == 0


def test_unloading_and_sampling_again_gives_the_same_latents(load, sample, expected, copies):
    patcher = load(2, 3)
    for _ in range(2):
        assert torch.equal(sample(patcher), expected)
        comfy.model_management.unload_all_models()


def test_the_host_memory_goes_with_the_last_clone(load, sample, copies):
    patcher = load(1, 1)
    sample(patcher)
    clone = patcher.clone()
    arena = weakref.ref(patcher.model.streaming.streamer.arena)
    del patcher
    gc.collect()
    assert arena() is not None
    comfy.model_management.unload_all_models()
    gc.disable()  # ComfyUI complains of a leak, and gives up more than it must, where memory waits for a collection
    try:
        del clone
        assert arena() is None
    finally:
        gc.enable()


def test_moving_the_model_from_outside_leaves_the_blocks_in_place(load, sample, expected, copies):
    patcher = load(1, 1)
    sample(patcher)
    transformer = patcher.model.diffusion_model

    def places():
        blocks = [*transformer.double_blocks, *transformer.single_blocks]
        tensors = [tensor for block in blocks for tensor in (*block.parameters(), *block.buffers())]
        return [(tensor.data_ptr(), tensor.dtype) for tensor in tensors]

    before = places()
    transformer.to(torch.float64)
    transformer.double_blocks.to("meta")
    transformer.single_blocks.half()
    assert places() == before
    transformer.to(torch.float32)
    assert torch.equal(sample(patcher), expected)


def test_blocks_that_comfyui_compiles_stream_whole(load, sample, expected, copies):
    patcher = load(1, 1)
    keys = [f"diffusion_model.double_blocks.{i}" for i in range(DOUBLES)]
    set_torch_compile_wrapper(model=patcher, backend="eager", keys=keys)
    assert torch.equal(sample(patcher), expected)
    streamer = patcher.model.streaming.streamer
    assert all(len(streamer.blocks[index].tiles) == 1 for index in streamer.plan.streamed)


def test_a_model_whose_last_patcher_went_can_be_unloaded_while_its_node_keeps_it(load, sample, copies):
    patcher = load(2, 3)
    kept = patcher.parent
    sample(patcher)
    assert kept.loaded_size() > kept.model.streaming.other_bytes
    del patcher
    gc.collect()
    comfy.model_management.unload_all_models()
    assert kept.model.streaming.streamer.device_bytes == 0


def test_other_settings_leave_one_entry_in_comfyuis_list(load, sample, expected, copies):
    kept = load(0, 0).parent
    for count in (1, 2, 3):
        assert torch.equal(sample(load(count, count)), expected)
    assert len(comfy.model_management.current_loaded_models) == 1
    assert kept.model.streaming.streamer.plan is not None


def test_a_clone_for_the_cpu_takes_the_blocks_off_the_device(load, sample, expected, copies, monkeypatch):
    patcher = load(2, 2)
    assert torch.equal(sample(patcher), expected)
    streamer = patcher.model.streaming.streamer
    assert streamer.plan is not None
    monkeypatch.setattr(StreamedModelPatcher, "_computes_from_host", True)
    changed = patcher.clone()
    changed.patches_uuid = object()  # it is loaded anew
    assert torch.equal(sample(changed), expected)
    assert streamer.plan is None
    assert streamer.device_bytes == 0


def test_the_last_forward_ends_with_the_sampling(load, sample, copies, monkeypatch):
    patcher = load()
    sample(patcher)
    ended = []
    rest = Telemetry.rest
    monkeypatch.setattr(Telemetry, "rest", lambda telemetry: ended.append(telemetry.forwards) or rest(telemetry))
    before = patcher.model.streaming.streamer.telemetry.forwards
    sample(patcher, steps=3)
    assert ended[0] == before + 2
    assert patcher.model.streaming.streamer.telemetry.forwards == before + 3


def test_an_observer_that_fails_ends_no_prompt(load, sample, expected, copies, monkeypatch, caplog):
    seen = []

    def fails(patcher):
        seen.append(patcher)
        raise RuntimeError("the page has gone")

    monkeypatch.setattr(streaming, "observers", [fails, seen.append])
    assert torch.equal(sample(load(1, 1)), expected)
    assert len(seen) >= 4, "told while it is loaded and when it ends, and the next one after the one that fails"
    assert "a report was not delivered" in caplog.text
