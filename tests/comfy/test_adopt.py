"""Models that other nodes have loaded, streamed: the same latents, and the MODEL they came from stays as it was."""

import contextlib
import copy
import gc
import sys
import types

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.supported_models
import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from tiny_blocks import DOUBLES, SINGLES
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from flux_nf4 import nodes
from flux_nf4.offload import block as block_module
from flux_nf4.offload.comfyui import lasting
from flux_nf4.offload.comfyui.adopt import stream_model
from flux_nf4.offload.comfyui.patcher import StreamedModelPatcher
from flux_nf4.offload.comfyui.requires import UnknownComfyUIError, require_comfyui
from flux_nf4.offload.plan import Residency

CPU = torch.device("cpu")


def host_memory(patcher):
    blocks = [*patcher.model.diffusion_model.double_blocks, *patcher.model.diffusion_model.single_blocks]
    return {parameter.data_ptr() for block in blocks for parameter in block.parameters()}


@pytest.mark.parametrize(
    "residency",
    [Residency(), Residency((("double", 2), ("single", 3))), Residency(budget_bytes=22_000_000)],
    ids=["automatic", "counts", "budget"],
)
def test_a_streamed_dense_model_gives_the_same_latents(residency, dense, sample, copies):
    expected = sample(dense)
    streamed = stream_model(dense, residency, "7")
    assert isinstance(streamed, StreamedModelPatcher)
    assert torch.equal(sample(streamed), expected)
    assert copies.nbytes > 0
    assert streamed.report().node_id == "7"


def test_the_model_it_came_from_goes_on_and_shares_its_memory(dense, sample, copies):
    expected = sample(dense)
    streamed = stream_model(dense, Residency((("double", 0), ("single", 0))), None)
    assert not isinstance(dense, StreamedModelPatcher)
    assert host_memory(dense) == host_memory(streamed)
    for patcher in (streamed, dense, streamed, dense):
        assert torch.equal(sample(patcher), expected)


def test_a_model_that_is_loaded_leaves_comfyuis_list_with_its_own_weights(dense, sample, copies):
    """ComfyUI's list is written to: no entry stays there, and none of them unloads the model once more when it goes."""
    plain, key = sample(dense), "diffusion_model.single_blocks.1.linear1.weight"
    patched = dense.clone()
    patched.add_patches({key: ("diff", (torch.ones(dense.model.state_dict()[key].shape),))})
    sample(patched)
    (entry,) = comfy.model_management.current_loaded_models
    assert entry.model.is_clone(dense)
    streamed = stream_model(dense, Residency((("double", 0), ("single", 0))), None)
    assert comfy.model_management.current_loaded_models == []
    assert dense.loaded_size() == 0
    del entry, patched
    gc.collect()
    assert torch.equal(sample(streamed), plain)
    assert torch.equal(sample(dense), plain)
    assert len(comfy.model_management.current_loaded_models) == 2


def test_patches_and_options_come_along(dense, sample, copies):
    key = "diffusion_model.single_blocks.1.linear1.weight"
    plain = sample(dense)
    patched = dense.clone()
    torch.manual_seed(1)
    shape = patched.model.diffusion_model.single_blocks[1].linear1.weight.shape
    patched.add_patches({key: ("diff", (torch.randn(shape),))}, 0.5)
    patched.model_options["transformer_options"]["mark"] = "kept"
    expected = sample(patched)
    streamed = stream_model(patched, Residency((("double", 1), ("single", 1))), None)
    assert torch.equal(sample(streamed), expected)
    assert not torch.equal(expected, plain)
    assert streamed.model_options["transformer_options"]["mark"] == "kept"


def test_a_wrapper_that_was_there_before_may_name_its_arguments(dense, sample, copies):
    """Ours comes after it then."""

    def naming(executor, x, t, c_concat, c_crossattn, control, transformer_options, **others):
        named = {"c_concat": c_concat, "c_crossattn": c_crossattn, "control": control}
        return executor(x, t, **named, transformer_options=transformer_options, **others)

    expected = sample(dense)
    dense.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "test", naming)
    streamed = stream_model(dense, Residency((("double", 0), ("single", 0))), None)
    assert torch.equal(sample(streamed), expected)
    assert streamed.model.streaming.streamer.telemetry.forwards > 0


def test_a_streamed_model_is_planned_anew_and_not_stacked(load, sample, copies):
    first = load(2, 2)
    again = stream_model(first, Residency((("double", 5), ("single", 0))), "9")
    assert again.model is first.model
    assert torch.equal(sample(again), sample(first))
    assert (again.plan != first.plan, again.node_id) == (True, "9")


def test_a_model_that_is_not_built_of_blocks_is_refused(dense):
    dense.model.diffusion_model = nn.Sequential(nn.Linear(4, 4), nn.ModuleList([nn.Linear(1, 1)]))
    with pytest.raises(ValueError, match="is not built of blocks"):
        stream_model(dense, Residency(), None)


def test_counts_of_kinds_that_a_model_does_not_have_are_said(dense, caplog):
    dense.model.diffusion_model.blocks = dense.model.diffusion_model.double_blocks
    del dense.model.diffusion_model.double_blocks
    node = nodes.StreamModelBlocks()
    node.stream(dense, double_blocks=3, single_blocks=2)
    assert "this model has no double blocks (it has: blocks, single), so their count is ignored" in caplog.text


def test_tensors_of_another_package_are_refused_by_name(dense):
    class Packed(torch.Tensor):
        pass

    layer = dense.model.diffusion_model.double_blocks[1].img_attn.proj
    layer.register_buffer("codes", torch.zeros(4).as_subclass(Packed))
    with pytest.raises(ValueError, match=r"double_blocks\.1\.img_attn\.proj\.codes is a Packed"):
        stream_model(dense, Residency(), None)


def test_another_compute_dtype_reaches_every_layer(dense, sample, copies):
    """As the node ModelComputeDtype sets it, on a model whose layers do not cast by themselves."""
    dense.model.to(torch.bfloat16)
    dense.model.model_config.set_inference_dtype(torch.bfloat16, None)
    dense.set_model_compute_dtype(torch.float32)
    streamed = stream_model(dense, Residency((("double", 1), ("single", 1))), None)
    expected = sample(dense)
    assert torch.equal(sample(streamed), expected)
    streamed.force_cast_weights = False
    comfy.model_management.unload_all_models()
    comfy.model_management.load_models_gpu([streamed])
    assert not streamed.model.diffusion_model.img_in.comfy_cast_weights


def by_bypass(patcher):
    patcher.set_injections("bypass", [comfy.patcher_extension.PatcherInjection(lambda _: None, lambda _: None)])


def compiled(patcher):
    set_torch_compile_wrapper(model=patcher, backend="eager", keys=["diffusion_model.single_blocks.0"])


def replaced(patcher):
    patcher.add_object_patch("diffusion_model.double_blocks.1", nn.Identity())


def whole(patcher):
    patcher.add_object_patch("diffusion_model", nn.Identity())


def method(patcher):
    layer = patcher.model.diffusion_model.double_blocks[0].img_attn
    patcher.add_object_patch("diffusion_model.double_blocks.0.img_attn.forward", layer.forward)


@pytest.mark.parametrize(
    ("bind", "what"),
    [
        (whole, "Identity in the place of diffusion_model"),
        (method, "method in the place of diffusion_model.double_blocks.0.img_attn.forward"),
        (by_bypass, "a LoRA by bypass, or another injection"),
        (compiled, "torch.compile"),
        (replaced, "Identity in the place of diffusion_model.double_blocks.1"),
    ],
)
def test_what_was_made_for_the_dense_layers_is_refused_with_advice(bind, what, dense):
    """It would compute on these, beside the streamed ones: without the patch, or without the streaming."""
    bound = dense.clone()
    bind(bound)
    with pytest.raises(ValueError, match=rf"has {what}, made for .* Put the node Stream Model Blocks before"):
        stream_model(bound, Residency(), None)
    assert isinstance(stream_model(dense, Residency(), None), StreamedModelPatcher)


def test_the_old_memory_goes_block_by_block(dense, monkeypatch):
    """So that streaming takes the RAM of the model and one block, not of two models."""
    doubles, singles = dense.model.diffusion_model.double_blocks, dense.model.diffusion_model.single_blocks
    modulation = [layer.lin for block in doubles for layer in (block.img_mod, block.txt_mod)]
    modulation += [block.modulation.lin for block in singles]
    others = [*(block.img_attn.qkv for block in doubles), *(block.linear1 for block in singles)]
    old = [[StorageWeakRef(layer.weight.untyped_storage()) for layer in layers] for layers in (modulation, others)]
    count, alive = len(modulation), []
    del doubles, singles, modulation
    make = block_module.Block

    def counting(*args):
        alive.append([sum(not memory.expired() for memory in of) for of in old])
        return make(*args)

    monkeypatch.setattr(block_module, "Block", counting)
    stream_model(dense, Residency(), None)
    assert alive[:count] == [[left, len(others)] for left in range(count, 0, -1)]
    assert alive[count:] == [[0, left] for left in range(len(others), 0, -1)]


def test_a_lack_of_ram_is_said(dense, monkeypatch, caplog):
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_, **__: 10**6)
    stream_model(dense, Residency(), None)
    assert "GiB of RAM and 0.0 GiB are free" in caplog.text


class Dynamic(comfy.model_patcher.ModelPatcher):
    """As ComfyUI's with dynamic VRAM, which reads the file again for a clone without it."""

    def is_dynamic(self):
        return True

    def clone(self, disable_dynamic=False, model_override=None):
        if not disable_dynamic:
            return super().clone()
        model, _ = model_override or self.cached_patcher_init[0](*self.cached_patcher_init[1])
        n = comfy.model_patcher.ModelPatcher(model, self.load_device, self.offload_device)
        n.patches = dict(self.patches)
        return n


def test_with_dynamic_vram_other_settings_read_nothing_again(dense, sample, copies, monkeypatch):
    override = "get_clone_model_override"  # which other versions have
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, override, lambda self: (self.model, None), raising=False)
    dynamic = Dynamic(dense.model, CPU, CPU)
    dynamic.cached_patcher_init = None
    with pytest.raises(ValueError, match=r"with a loader of ComfyUI's own \(Load Diffusion Model, Load Checkpoint\)"):
        stream_model(dynamic, Residency(), None)
    reads = []

    def read():
        reads.append(1)
        config = dense.model.model_config
        return copy.deepcopy(dense.model, {id(config): config}), None

    dynamic.cached_patcher_init = read, ()
    expected = sample(dense)
    for count in (0, 3, 1):
        streamed = stream_model(dynamic, Residency((("double", count), ("single", count))), None)
        assert torch.equal(sample(streamed), expected)
    assert len(reads) == 1


def for_another_gpu(patcher):
    """What ComfyUI samples on a further GPU beside ``patcher``: a clone of it over a model that it has loaded anew."""
    if hasattr(patcher, "deepclone_multigpu"):
        return patcher.deepclone_multigpu(new_load_device=CPU)
    function, arguments = patcher.cached_patcher_init
    twin = function(*arguments).clone()
    twin.patches, twin.residency = patcher.patches, patcher.residency
    return twin


def test_comfyui_shares_a_sampling_among_gpus(dense, sample, copies):
    config = dense.model.model_config
    anew = copy.deepcopy(dense.model, {id(config): config})

    def load(disable_dynamic=False):
        return [comfy.model_patcher.ModelPatcher(anew, CPU, CPU)]

    dense.cached_patcher_init = load, (), 0
    streamed = stream_model(dense, Residency((("double", 1), ("single", 2))), None)
    key = "diffusion_model.single_blocks.1.linear1.weight"
    streamed.add_patches({key: ("diff", (torch.randn(dense.model.get_parameter(key).shape),))}, 0.5)
    expected = sample(streamed)
    twin = for_another_gpu(streamed)
    assert isinstance(twin, StreamedModelPatcher)
    assert not host_memory(twin) & host_memory(streamed)
    assert (twin.residency, twin.model is streamed.model) == (streamed.residency, False)
    for patcher in (twin, streamed, twin):
        assert torch.equal(sample(patcher), expected)


def test_so_it_does_a_4_bit_model(load, sample, copies):
    first = load(2, 2)
    expected = sample(first)
    twin = for_another_gpu(first)
    assert twin.model is not first.model
    assert twin.model.streaming.streamer.arena is first.model.streaming.streamer.arena, "one copy is enough"
    for patcher in (twin, first, twin):
        assert torch.equal(sample(patcher), expected)


def test_a_model_that_its_loader_cannot_load_again_has_no_twin(dense):
    assert stream_model(dense, Residency(), None).cached_patcher_init is None


def test_what_lasts_is_allocated_outside_of_what_comfyui_records(with_more_residents, monkeypatch):
    """Its compiler gives away again what it has recorded in a forward."""
    is_paused, allocated = [], []

    @contextlib.contextmanager
    def pause(sync=False):
        is_paused.append(sync)
        yield
        is_paused.pop()

    prefetch = types.ModuleType("comfy.model_prefetch")
    prefetch.pause_malloc_graph = pause
    monkeypatch.setitem(sys.modules, "comfy.model_prefetch", prefetch)
    lasting._prefetch.cache_clear()
    try:
        with_more_residents(lambda nbytes: allocated.append((nbytes, list(is_paused))))
    finally:
        lasting._prefetch.cache_clear()
    assert allocated
    assert all(paused == [True] for _, paused in allocated)


@pytest.fixture
def with_more_residents(load, copies, sample, monkeypatch):
    """A function: loads a model, gives residents up and takes them again, and tells each allocation on the device."""

    def run(tell):
        empty = copies.empty
        monkeypatch.setattr(copies, "empty", lambda nbytes: tell(nbytes) or empty(nbytes))
        patcher = load(DOUBLES, SINGLES)
        sample(patcher, steps=1)
        patcher.partially_unload(CPU, patcher.loaded_size() // 2)
        sample(patcher, steps=1)

    return run


def test_it_holds_where_comfyui_runs_nodes(dense, sample):
    """In inference mode, on the CPU as load device; blocks then compute straight from host memory."""
    with torch.inference_mode():
        for _ in range(2):
            expected = sample(dense)
            streamed = stream_model(dense, Residency((("double", 3), ("single", 4))), None)
            for patcher in (streamed, dense, streamed, dense):
                assert torch.equal(sample(patcher), expected)
        comfy.model_management.unload_all_models()
        for patcher in (dense, streamed):
            assert torch.equal(sample(patcher), expected)


def test_a_comfyui_that_has_changed_is_named_and_the_model_stays_as_it_is(dense, monkeypatch, caplog):
    monkeypatch.delattr(comfy.model_patcher.ModelPatcher, "partially_unload")
    assert stream_model(dense, Residency(), None) is dense
    assert "has no comfy.model_patcher.ModelPatcher.partially_unload, which streaming needs" in caplog.text
    assert "The model is not streamed" in caplog.text


def test_a_4_bit_model_is_refused_there(load, monkeypatch):
    monkeypatch.delattr(comfy.model_patcher.ModelPatcher, "partially_unload")
    with pytest.raises(UnknownComfyUIError, match=r"ComfyUI [\d.]+ has no .*partially_unload"):
        load()


def test_nothing_is_missing_from_this_comfyui():
    require_comfyui()


def test_a_dense_model_is_copied_once_for_any_number_of_settings(dense, sample, copies):
    expected = sample(dense)
    few, many = (stream_model(dense, Residency((("double", n), ("single", n))), None) for n in (1, 4))
    assert few.is_clone(many)
    assert host_memory(few) == host_memory(many) == host_memory(dense)
    for streamed in (few, many, few):
        assert torch.equal(sample(streamed), expected)
    again = few.model.streaming
    del few, many, streamed
    assert stream_model(dense, Residency(), None).model.streaming is again
