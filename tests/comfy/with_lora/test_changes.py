"""A change of a LoRA moves no more than it has to, leaves nothing behind, and residency never shows."""

import functools
import itertools

import comfy.lora
import comfy.model_management
import loras
import pytest
import torch
from fake_registrar import FakeRegistrar

from flux_nf4.offload import extras as extras_module
from flux_nf4.offload.arena import HostArena
from flux_nf4.offload.comfyui import streaming as streaming_module
from flux_nf4.offload.comfyui.patcher import StreamedModelPatcher
from flux_nf4.offload.comfyui.patching import Patching
from flux_nf4.offload.plan import Residency

NAME = "double_blocks.1.img_mlp.0"
DENSE = NAME, "single_blocks.0.linear1", "single_blocks.1.linear2", "double_blocks.0.txt_attn.proj"


def with_residency(patcher, double, single):
    clone = patcher.clone()
    clone.residency = Residency((("double", double), ("single", single)))
    return clone


@pytest.fixture
def files(shapes, config, twin_model):
    """LoRA files of every way in which a patch is computed."""
    mixed = {}
    for name in DENSE:
        mixed |= loras.adapters(f"diffusion_model.{name}", shapes[name])["dora"]
    return {
        "low rank": loras.kohya(shapes),
        "split": loras.diffusers(config.unet_config, shapes),
        "dense": mixed,
        "all layers, biases and norms": loras.black_forest_labs(twin_model),
    }


@pytest.mark.parametrize("kind", ["low rank", "split", "dense", "all layers, biases and norms"])
def test_streamed_is_resident_to_the_bit(kind, files, load, sample, with_lora, copies):
    expected = sample(with_lora(load(2, 3), files[kind], 0.8))
    assert not torch.equal(expected, sample(load(2, 3)))
    for double, single in itertools.product(range(3), range(4)):
        assert torch.equal(sample(with_lora(load(double, single), files[kind], 0.8)), expected)


@pytest.mark.parametrize(("count", "rank"), [(1, 128), (4, 16), (16, 16)])
def test_many_loras_stream_as_they_stay(count, rank, load, sample, with_lora, copies, shapes):
    def patched(patcher):
        for seed in range(count):
            patcher = with_lora(patcher, loras.kohya(shapes, rank, seed=str(seed)), 0.8 / count)
        return patcher

    expected = sample(patched(load(2, 3)))
    for double, single in ((0, 0), (1, 2)):
        assert torch.equal(sample(patched(load(double, single))), expected)


def test_another_strength_and_other_residents_are_as_from_the_start(files, load, sample, with_lora, copies):
    file, plain = files["low rank"], load(0, 1)
    expected = sample(with_lora(load(2, 3), file, 0.9))
    first = sample(with_lora(plain, file, 0.3))
    assert not torch.equal(first, expected)
    for patcher in (plain, with_residency(plain, 2, 3), with_residency(plain, 1, 0)):
        assert torch.equal(sample(with_lora(patcher, file, 0.9)), expected)
    assert torch.equal(sample(with_lora(plain, file, 0.3)), first)


def test_another_lora_of_the_same_shapes_takes_its_place(load, sample, with_lora, copies, shapes):
    file, other = (loras.kohya(shapes, seed=seed) for seed in "ab")
    plain = load(1, 1)
    expected = sample(with_lora(load(2, 3), other, 0.8))
    assert not torch.equal(sample(with_lora(plain, file, 0.8)), expected)
    assert torch.equal(sample(with_lora(plain, other, 0.8)), expected)


def test_patches_change_nothing_in_host_memory(files, load, sample, with_lora, copies):
    patcher = load(1, 1)
    records = patcher.model.streaming.streamer.arena.records
    before = [record.clone() for record in records]
    for file in files.values():
        patcher = with_lora(patcher, file)
    sample(patcher)
    assert all(torch.equal(record, was) for record, was in zip(records, before, strict=True))


@pytest.mark.parametrize("kind", ["low rank", "split", "dense", "all layers, biases and norms"])
def test_removing_a_lora_gives_the_plain_model_to_the_bit(kind, files, load, sample, with_lora, copies):
    plain = load(1, 1)
    expected = sample(plain)
    state = {name: (tensor.shape, tensor.dtype) for name, tensor in plain.model.state_dict().items()}
    assert not torch.equal(sample(with_lora(plain, files[kind])), expected)
    assert torch.equal(sample(plain), expected)
    assert {name: (t.shape, t.dtype) for name, t in plain.model.state_dict().items()} == state
    assert not [name for name, _ in plain.model.named_buffers() if "lora_" in name or "_patch_" in name]


def test_clones_with_their_own_loras_can_be_sampled_in_turn(files, load, sample, with_lora, copies):
    plain = load(0, 1)
    patchers = [plain, *(with_lora(plain, file) for file in files.values())]
    first = [sample(patcher, steps=1) for patcher in patchers]
    assert len({latent.sum().item() for latent in first}) == len(patchers)
    assert all(torch.equal(sample(p, steps=1), was) for p, was in zip(reversed(patchers), reversed(first), strict=True))


def test_another_strength_brings_new_scales_and_nothing_else(files, load, shapes, with_lora):
    plain = load()
    layer = plain.model.get_submodule(f"diffusion_model.{NAME}")
    tensors = []
    for strength in (0.5, 0.9, 0.9):
        patches = with_lora(with_lora(plain, files["split"]), files["low rank"], strength).patches
        given = layer.take_patches(patches[f"diffusion_model.{NAME}.weight"], torch.float32)
        tensors.append(dict(given))
    first, second, third = tensors
    assert [name for name in first if second[name] is not first[name]] == ["lora_scale"]
    assert all(third[name] is second[name] for name in first)


def test_a_change_copies_only_what_it_changes(files, load, sample, with_lora, copies):
    """On the device: of a new strength the small parts of the records, of a new LoRA no byte of a resident block."""
    plain = load(2, 1)

    def copied_after(before, patcher):
        sample(before, steps=1)
        copies.nbytes = 0
        comfy.model_management.load_models_gpu([patcher])
        return copies.nbytes

    first, second = (with_lora(plain, files["low rank"], strength) for strength in (0.3, 0.9))
    streaming = plain.model.streaming
    streamer = streaming.streamer
    rings = lambda: sum(each.plan.staging_bytes for each in streaming.streamers)  # noqa: E731
    sample(plain, steps=1)
    residents = streamer.device_bytes - streamer.plan.staging_bytes
    assert copied_after(plain, first) < residents / 2 + streaming.modulation.streamer.plan.staging_bytes
    factors = streamer.extras_arena
    blocks = [block for each in streaming.streamers for block in each.blocks]
    assert copied_after(first, second) == sum(block.staying.buffer.nbytes for block in blocks)
    assert streamer.extras_arena is factors
    assert copied_after(second, plain) <= rings()


def test_factors_are_pinned_with_their_blocks(files, load, with_lora, copies, monkeypatch):
    monkeypatch.setattr(streaming_module, "pin_limit", lambda _: (1 << 40, None))
    monkeypatch.setattr(extras_module, "HostArena", functools.partial(HostArena, registrar_for=FakeRegistrar()))
    patcher = with_lora(load(0, 0), files["low rank"])
    comfy.model_management.load_models_gpu([patcher])
    factors = patcher.model.streaming.streamer.extras_arena
    assert factors.nbytes
    assert factors.all_pinned


def test_a_forward_computes_from_buffers_only(files, load, sample, with_lora, copies, monkeypatch):
    """A tensor that is no buffer would be copied from the host in every forward."""
    patcher = with_lora(load(), files["dense"])
    comfy.model_management.load_models_gpu([patcher])
    layer = patcher.model.get_submodule(f"diffusion_model.{NAME}")
    calculate, seen = comfy.lora.calculate_weight, []

    def record(patches, *args, **kwargs):
        tensors = [value for value in patches[0][1].weights if isinstance(value, torch.Tensor)]
        seen.extend(any(tensor is buffer for buffer in layer.buffers()) for tensor in tensors)
        return calculate(patches, *args, **kwargs)

    monkeypatch.setattr(comfy.lora, "calculate_weight", record)
    layer(torch.zeros(1, 256))
    assert seen == [True, True, True]


class Interrupt(BaseException):
    pass


def test_an_interrupted_run_leaves_the_next_one_equal(files, load, sample, with_lora, copies):
    patcher = with_lora(with_lora(load(0, 1), files["low rank"]), files["dense"])
    expected = sample(patcher)

    def interrupt(*_):
        raise Interrupt

    handle = patcher.model.diffusion_model.single_blocks[1].linear2.register_forward_pre_hook(interrupt)
    with pytest.raises(Interrupt):
        sample(patcher)
    handle.remove()
    assert torch.equal(sample(patcher), expected)


def test_unloading_takes_the_factors_off_the_device(files, load, sample, with_lora, copies):
    patcher = with_lora(load(1, 1), files["all layers, biases and norms"])
    expected = sample(patcher)
    comfy.model_management.unload_all_models()
    assert not [name for name, _ in patcher.model.named_buffers() if "lora_" in name or "_patch_" in name]
    assert torch.equal(sample(patcher), expected)


def test_what_nodes_read_of_a_patched_model_is_unpatched(files, load, sample, with_lora, copies):
    """Merge and save nodes take the weights and the patches, and put them together themselves."""
    patcher = with_lora(load(), files["all layers, biases and norms"])
    key = "diffusion_model.double_blocks.0.img_attn.proj.bias"
    before = patcher.get_key_patches()[key][0][0].clone()
    sample(patcher, steps=1)
    (weight, _), *patches = patcher.get_key_patches()[key]
    assert torch.equal(weight, before)
    assert len(patches) == 1


def test_a_lora_that_could_not_be_put_in_place_leaves_the_plain_model(
    files, load, sample, with_lora, copies, monkeypatch
):
    plain = load(1, 1)
    expected = sample(plain)
    first, second = with_lora(plain, files["low rank"]), with_lora(plain, files["split"])
    sample(first)
    taken, numbers = Patching._taken, itertools.count()

    def fail(*arguments):
        if next(numbers) == 2:
            raise MemoryError
        return taken(*arguments)

    monkeypatch.setattr(Patching, "_taken", fail)
    with pytest.raises(MemoryError):
        sample(second)
    monkeypatch.undo()
    assert torch.equal(sample(plain), expected)


def test_factors_that_found_no_room_leave_the_plain_model(files, load, sample, with_lora, copies, monkeypatch):
    """Blocks and modulation have a streamer each: the first has its factors when the second fails."""
    plain = load(1, 1)
    expected = sample(plain)
    patched = with_lora(plain, files["low rank"])
    with_factors = sample(patched)
    streaming = patched.model.streaming
    other = with_lora(plain, files["split"])
    set_extras = streaming.modulation.streamer.set_extras
    failures = [MemoryError("fake")]

    def fail_once(extras):
        if failures and extras:
            raise failures.pop()
        set_extras(extras)

    monkeypatch.setattr(streaming.modulation.streamer, "set_extras", fail_once)
    with pytest.raises(MemoryError):
        sample(other)
    assert not failures
    assert [streamer.extras_arena for streamer in streaming.streamers] == [None, None]
    assert torch.equal(sample(plain), expected)
    assert torch.equal(sample(patched), with_factors)


def test_what_patches_put_on_the_device_is_in_the_size_that_comfyui_sees(files, load, with_lora, copies):
    plain = load(0, 0)
    comfy.model_management.load_models_gpu([plain])
    before = plain.loaded_size() - plain.model.streaming.streamer.device_bytes
    patched = with_lora(plain, files["all layers, biases and norms"])
    comfy.model_management.load_models_gpu([patched])
    values = [value for module in patched.model.modules() for value in module.__dict__.values()]
    shadows = sum(value.nbytes for value in values if isinstance(value, torch.Tensor))
    assert shadows > 0
    assert patched.loaded_size() - patched.model.streaming.streamer.device_bytes >= before + shadows


@pytest.mark.parametrize("kind", ["all layers, biases and norms", "dense"])
def test_what_patches_take_is_not_there_for_residents(kind, files, load, with_lora, copies, shapes):
    """Neither what they put on the device nor what they take for a while to patch a dense weight."""
    patched = with_lora(load(), files[kind])
    patched.residency = Residency()
    comfy.model_management.load_models_gpu([patched])
    patching = patched.model.streaming.patching
    assert patching.device_bytes + patching.scratch_bytes > 0
    if kind == "dense":
        assert patching.scratch_bytes == 2 * 4 * max(shapes[name][0] * shapes[name][1] for name in DENSE)
    room = patched.loaded_size() + patching.scratch_bytes - 1
    patched.load(torch.device("cpu"), lowvram_model_memory=room)
    assert patched.loaded_size() + patching.scratch_bytes <= room


def test_comfyui_is_asked_to_give_up_pins_that_rest(load, copies, monkeypatch):
    asked = []
    give_up = lambda size, evict_active: asked.append((size, evict_active))  # noqa: E731
    monkeypatch.setattr(comfy.model_management, "ensure_pin_registerable", give_up, raising=False)
    patcher = load(0, 0)
    comfy.model_management.load_models_gpu([patcher])
    assert asked == [(patcher.model.streaming.host_bytes, False)]


def test_a_lora_goes_to_the_cpu_and_back_with_its_model(load, sample, with_lora, shapes, copies, monkeypatch):
    patcher = with_lora(load(2, 2), loras.kohya(shapes, rank=8), 0.5)
    expected = sample(patcher)
    streamer = patcher.model.streaming.streamer
    for computes_from_host in (True, False):
        monkeypatch.setattr(StreamedModelPatcher, "_computes_from_host", computes_from_host)
        patcher = patcher.clone()
        patcher.patches_uuid = object()  # it is loaded anew
        assert torch.equal(sample(patcher), expected)
        assert (streamer.plan is None, streamer.device_bytes == 0) == (computes_from_host, computes_from_host)
