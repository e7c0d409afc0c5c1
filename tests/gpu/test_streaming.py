"""Output never depends on residency, on a GPU: with real streams, events and kernels."""

import gc
import warnings

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import loras
import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from gpu_models import DEVICE, TINY, requested_bytes
from tiny_flux import detection_of
from torch._inductor import cudagraph_trees

from flux_nf4.checkpoints import Residency
from flux_nf4.offload.comfyui.adopt import stream_model
from flux_nf4.offload.copies import copies_to
from flux_nf4.offload.plan import plan_for
from flux_nf4.offload.streamer import Streamer


def blocks_of(patcher):
    transformer = patcher.model.diffusion_model
    return [*transformer.double_blocks, *transformer.single_blocks]


def last_linear(block):
    return block.img_mlp[2] if hasattr(block, "img_mlp") else block.linear2


def test_streaming_every_block_gives_the_same_latents(model, expected):
    patcher = model.with_counts(0, 0)
    assert torch.equal(model.sample(patcher), expected)
    report = patcher.report()
    assert (report.resident, len(report.streamed)) == ((), len(report.kinds))
    assert report.pinned_bytes == report.host_bytes


def test_streaming_half_of_the_blocks_gives_the_same_latents(model, expected):
    patcher = model.half()
    assert torch.equal(model.sample(patcher), expected)
    report = patcher.report()
    assert len(report.resident) == len(report.streamed) == len(report.kinds) / 2


def test_streaming_whole_blocks_gives_the_same_latents(model, expected):
    block = blocks_of(model.loaded)[0]
    room = 3 * sum(tensor.nbytes for tensor in (*block.parameters(), *block.buffers()))
    patcher = model.with_counts(0, 0, whole_blocks=True, staging_bytes=room)
    assert torch.equal(model.sample(patcher), expected)


def test_a_budget_is_kept_and_gives_the_same_latents(model, expected):
    least, most = model.with_counts(0, 0).model_size(), model.resident().model_size()
    patcher = model.with_residency(Residency(budget_bytes=(least + most) // 2))
    assert torch.equal(model.sample(patcher), expected)
    report = patcher.report()
    assert report.resident
    assert report.streamed
    assert report.device_bytes <= (least + most) // 2


def test_what_is_reported_is_what_the_allocator_holds(model):
    comfy.model_management.unload_all_models()
    gc.collect()  # what earlier tests have left
    for patcher in (model.with_counts(0, 0), model.half(), model.resident()):
        before = requested_bytes()
        comfy.model_management.load_models_gpu([patcher])
        held = requested_bytes() - before
        rounding = 512 * len([*patcher.model.parameters(), *patcher.model.buffers()])
        assert abs(held - patcher.report().device_bytes) <= rounding
        comfy.model_management.unload_all_models()
        assert requested_bytes() <= before  # less: each MODEL begins with a schedule (40 kB) where another has it


class Interrupt(BaseException):
    """As ComfyUI's own: raised from inside any layer."""


@pytest.mark.parametrize("residency", ["none", "half"])
@pytest.mark.parametrize("block", [0, -1])
def test_an_interrupt_leaves_the_next_sampling_equal(block, residency, model, expected):
    patcher = model.with_counts(0, 0) if residency == "none" else model.half()

    def interrupt(*_):
        raise Interrupt

    handle = last_linear(blocks_of(patcher)[block]).register_forward_pre_hook(interrupt)
    with pytest.raises(Interrupt):
        model.sample(patcher)
    handle.remove()
    assert torch.equal(model.sample(patcher), expected)


def test_residents_given_up_between_forwards_change_nothing(model):
    patcher = model.half()
    comfy.model_management.load_models_gpu([patcher])
    before = model.forward(patcher)
    held = torch.cuda.memory_allocated(DEVICE)
    freed = patcher.partially_unload(torch.device("cpu"), 1)
    assert freed > 0
    after = model.forward(patcher)
    assert torch.cuda.memory_allocated(DEVICE) < held
    assert len(patcher.report().resident) < len(patcher.report().kinds) // 2
    assert torch.equal(after, before)


def test_other_settings_for_a_model_on_the_device_change_nothing(model, expected):
    for patcher in (model.with_counts(0, 0), model.half(), model.with_counts(1, 0), model.resident()):
        assert torch.equal(model.sample(patcher), expected)


def test_two_models_in_turns_give_the_latents_of_each_alone(tiny, other_tiny):
    models = tiny, other_tiny
    expected = [model.sample(model.resident()) for model in models]
    assert not torch.equal(*expected)
    patchers = [model.with_counts(0, 0) for model in models]
    for _ in range(2):
        for model, patcher, latents in zip(models, patchers, expected, strict=True):
            assert torch.equal(model.sample(patcher), latents)


def test_two_models_in_turns_take_the_ring_from_each_other_while_copies_are_under_way(tiny, other_tiny):
    models = tiny, other_tiny
    expected = []
    for model in models:
        patcher = model.resident()
        comfy.model_management.load_models_gpu([patcher])
        expected.append(model.forward(patcher))
    patchers = [model.with_counts(0, 0) for model in models]
    comfy.model_management.load_models_gpu(patchers)
    for _ in range(10):
        found = [model.forward(patcher) for model, patcher in zip(models, patchers, strict=True)]
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("rank", [8, 32])
def test_a_lora_gives_the_same_latents_streamed_and_resident(rank, model, expected):
    file = loras.kohya(loras.linear_shapes(model.loaded.model), rank, alpha=rank)

    def patched(patcher, strength):
        return comfy.sd.load_lora_for_models(patcher, None, file, strength, 0)[0]

    with_lora = model.sample(patched(model.resident(), 0.8))
    assert not torch.equal(with_lora, expected)
    weaker = model.sample(patched(model.resident(), 0.3))
    assert not torch.equal(with_lora, weaker)
    for streamed in (model.with_counts(0, 0), model.half()):
        assert torch.equal(model.sample(patched(streamed, 0.8)), with_lora)
        assert torch.equal(model.sample(patched(streamed, 0.3)), weaker)
        assert torch.equal(model.sample(streamed), expected)


def test_compiled_blocks_give_the_same_latents_streamed_and_resident(tiny):
    """Against each other: the compiler rounds at other places than the uncompiled kernels do."""
    torch.compiler.reset()
    keys = ["diffusion_model.double_blocks.0", "diffusion_model.single_blocks.0"]
    latents = []
    for patcher in (tiny.resident(), tiny.with_counts(0, 0), tiny.half()):
        patcher.staging_bytes = 8 << 20  # a ring of whole blocks, but not of all
        set_torch_compile_wrapper(model=patcher, backend="inductor", keys=keys)
        latents.append(tiny.sample(patcher))
    assert torch.equal(latents[1], latents[0])
    assert torch.equal(latents[2], latents[0])
    uncompiled = tiny.sample(tiny.resident())
    assert (latents[0] - uncompiled).norm() / uncompiled.norm() < 0.05


class Residual(torch.nn.Module):
    """A block that leaves its input alone. Flux's add to theirs in place, of which PyTorch captures no CUDA graph."""

    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(256, 1024), torch.nn.Linear(1024, 256)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


def test_cuda_graphs_of_compiled_blocks_give_the_same_streamed_and_resident():
    """A graph has the addresses of the weights in it, and those of a streamed block change."""
    torch.manual_seed(0)
    blocks = [Residual() for _ in range(6)]
    streamer = Streamer({"block": blocks})
    sizes, input = streamer.sizes(whole_blocks=True), torch.randn(64, 256, device=DEVICE)
    found, graphs = [], []
    for resident in (range(6), (), (0, 2, 5)):
        torch.compiler.reset()
        plan = plan_for(sizes, resident, staging_bytes=3 * sizes[0].streamed)
        streamer.start(plan, copies_to(DEVICE), whole_blocks=True)
        compiled = [torch.compile(block, mode="reduce-overhead") for block in blocks]
        for _ in range(4):  # warms up, records, replays, replays
            x = input
            with torch.inference_mode():
                for block in compiled:
                    x = block(x).clone()  # the next graph may write over what one has given
            found.append(x)
        manager = cudagraph_trees.get_manager(DEVICE.index or 0, create_if_none_exists=False)
        graphs.append(sum(map(len, manager.roots.values())) if manager is not None else 0)
    streamer.stop()
    print(f"graphs captured: {graphs}")
    assert graphs[0], "no graph was captured, so this shows nothing"
    assert all(torch.equal(x, found[0]) for x in found)


def test_a_streamed_forward_allocates_and_waits_no_more_than_a_resident_one(model):
    def counts(patcher):
        comfy.model_management.load_models_gpu([patcher])
        for _ in range(2):  # the first one learns in which order a block calls its layers
            model.forward(patcher)
        return counted(lambda: model.forward(patcher))

    (allocated, waits), (of_resident, waits_of_resident) = counts(model.with_counts(0, 0)), counts(model.resident())
    assert waits == waits_of_resident
    assert allocated <= of_resident + 2  # the vector that the modulation sees, and its bits


def counted(call):
    """How often ``call`` allocates memory of the device, and how often the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        call()
        allocated = torch.cuda.memory_stats()["allocation.all.allocated"] - before
    torch.cuda.set_sync_debug_mode("default")
    return allocated, sum("synchronizing" in str(warning.message) for warning in caught)


@pytest.fixture(params=[torch.bfloat16, torch.float8_e4m3fn], ids=["bf16", "fp8"])
def dense(request):
    """A stock MODEL with random weights in that dtype, which computes in bf16."""
    config = detection_of(TINY.double_blocks, TINY.single_blocks)()
    is_fp8 = request.param != torch.bfloat16
    config.set_inference_dtype(request.param, torch.bfloat16 if is_fp8 else None)
    built = config.get_model({}, "")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return comfy.model_patcher.ModelPatcher(built, DEVICE, torch.device("cpu"))


def test_a_dense_model_that_a_node_streams_gives_the_same_latents(dense, tiny):
    expected = tiny.sample(dense)
    for counts in ((0, 0), (2, 3)):
        patcher = stream_model(dense, Residency(tuple(zip(("double", "single"), counts, strict=True))), "7")
        patcher.staging_bytes = tiny.staging_bytes
        assert torch.equal(tiny.sample(patcher), expected)
        assert len(patcher.report().resident) == sum(counts)
    assert torch.equal(tiny.sample(dense), expected)
