"""State that other nodes put on the model object: other settings of a loader have none of it, as in stock ComfyUI."""

import copy
import gc

import comfy.model_management
import comfy.model_sampling
import pytest
import torch
from comfy.ldm.flux.layers import DoubleStreamBlock
from comfy.ldm.flux.model import Flux
from prompts import prompt
from tiny_blocks import DOUBLES, SINGLES
from tiny_flux import HIDDEN

from flux_nf4.offload.comfyui.adopt import stream_model
from flux_nf4.offload.plan import Residency


@pytest.fixture(params=["4 bits", "dense"])
def loaded(request, load, dense):
    """A function: what a loader gives for these numbers of double and single blocks."""
    if request.param == "4 bits":
        return load
    return lambda *counts: stream_model(dense, Residency(tuple(zip(("double", "single"), counts, strict=True))), None)


class Shifted(comfy.model_sampling.ModelSamplingFlux, comfy.model_sampling.CONST):
    """Another schedule: what DyPE and ModelSamplingFlux put in the place of a model's own."""


def shifted(patcher, shift=3.0):
    """As a node that patches once and remembers on the model object that it has."""
    patched = patcher.clone()
    if not hasattr(patched.model, "_shifted_by"):
        schedule = Shifted(patched.model.model_config)
        schedule.set_parameters(shift)
        patched.add_object_patch("model_sampling", schedule)
        patched.model._shifted_by = shift
    return patched


def test_other_settings_are_as_a_model_that_was_read_anew(loaded, sample, copies):
    plain = sample(loaded(2, 2))
    first = loaded(2, 2)
    expected = sample(shifted(first))
    assert not torch.equal(expected, plain)
    for counts in ((2, 2), (0, 0), (3, 1)):
        other = loaded(*counts)
        assert torch.equal(sample(shifted(other)), expected)
        assert not hasattr(loaded(*counts).model, "_shifted_by")
        assert torch.equal(sample(loaded(*counts)), plain)


def test_nor_have_they_other_parameters_of_the_transformer(loaded, copies):
    first, before = loaded(2, 2).model.diffusion_model, loaded(2, 2).model.diffusion_model.params.theta
    first.params.theta = before + 1
    assert loaded(2, 2).model.diffusion_model.params.theta == before


class LouderFlux(Flux):
    """Another transformer and other blocks: what RES4LYF makes of a model's own."""

    def forward_orig(self, *args, **kwargs):
        return super().forward_orig(*args, **kwargs) * self.loudness


class LouderBlock(DoubleStreamBlock):
    def forward(self, img, txt, **kwargs):
        img, txt = super().forward(img * 1.25, txt, **kwargs)
        self.calls = getattr(self, "calls", 0) + 1
        return img, txt


def louder(patcher):
    """As a node that gives a MODEL's own transformer and blocks other classes, and state."""
    patched = patcher.clone()
    transformer = patched.model.diffusion_model
    transformer.__class__, transformer.loudness = LouderFlux, 1.5
    for block in transformer.double_blocks:
        block.__class__ = LouderBlock
    return patched


def test_nor_have_they_what_was_made_of_transformer_and_blocks(loaded, sample, copies):
    plain = sample(loaded(2, 2))
    patched = louder(loaded(2, 2))
    expected = sample(patched)
    assert not torch.equal(expected, plain)
    for counts in ((2, 2), (0, 0), (3, 1)):
        other = loaded(*counts)
        transformer = other.model.diffusion_model
        assert type(transformer) is Flux
        assert {type(block) for block in transformer.double_blocks} == {DoubleStreamBlock}
        assert not hasattr(transformer, "loudness")
        assert torch.equal(sample(other), plain)
        assert torch.equal(sample(louder(loaded(*counts))), expected)
        assert torch.equal(sample(patched), expected)
        assert torch.equal(sample(other), plain)
    assert all(block.calls for block in patched.model.diffusion_model.double_blocks)


@pytest.mark.parametrize("differs", ["weights", "schedule", "nothing"])
def test_two_of_one_file_take_turns_within_a_sampling_only_if_they_are_alike(differs, loaded, copies):
    """ComfyUI's guider of two models loads both, then runs a forward of each in every step."""
    one, other = loaded(1, 1), loaded(2, 2)
    if differs == "weights":
        patch = ("diff", (torch.ones(3 * HIDDEN, HIDDEN),))
        assert other.add_patches({"diffusion_model.double_blocks.1.img_attn.qkv.weight": patch})
    if differs == "schedule":
        other = shifted(other)

    def forward(patcher):
        context, extra = prompt()[0]
        inputs = {"c_crossattn": context, "y": extra["pooled_output"], "guidance": torch.tensor([3.5])}
        with torch.inference_mode():
            return patcher.model.apply_model(
                torch.ones(1, 16, 8, 8), torch.tensor([0.5]), transformer_options={"wrappers": one.wrappers}, **inputs
            )

    expected = []
    for patcher in (one, other):
        comfy.model_management.load_models_gpu([patcher])
        patcher.pre_run()
        expected.append(forward(patcher))
    assert torch.equal(*expected) is (differs != "weights")
    comfy.model_management.load_models_gpu([one])
    if differs == "nothing":
        assert torch.equal(forward(other), expected[1])
    else:
        with pytest.raises(RuntimeError, match=r"two MODELs of one file with other patches .* cannot take turns"):
            forward(other)
    assert torch.equal(forward(one), expected[0])
    comfy.model_management.load_models_gpu([other])
    assert torch.equal(forward(other), expected[1])


def test_the_layers_are_the_same_objects_and_what_is_above_them_stays_in_place(loaded, copies):
    patchers = loaded(1, 1), loaded(2, 2)
    one, two = (patcher.model.diffusion_model for patcher in patchers)
    assert one.double_blocks[0] is not two.double_blocks[0]
    assert one.double_blocks[0].img_attn.qkv is two.double_blocks[0].img_attn.qkv
    assert one.img_in is two.img_in
    block = one.single_blocks[0]
    assert block.to("meta") is block
    assert not any(tensor.is_meta for tensor in (*block.parameters(), *block.buffers()))
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(block)


@pytest.mark.parametrize("whole_blocks", [False, True])
def test_hooks_that_stream_are_those_of_all_the_models(whole_blocks, loaded, sample, copies):
    plain = sample(loaded(DOUBLES, SINGLES - 1))
    for counts in ((0, 0), (1, 2)):
        patcher = loaded(*counts)
        patcher.whole_blocks = whole_blocks
        assert torch.equal(sample(patcher), plain)
        assert patcher.report().cost.refetched == 0


def test_a_block_that_is_compiled_in_place_is_streamed_as_a_whole(loaded, sample, copies):
    plain, patcher, other = sample(loaded(1, 1)), loaded(1, 1), loaded(2, 2)
    patcher.model.diffusion_model.single_blocks[0].compile(backend="eager")
    assert torch.equal(sample(patcher), plain)
    assert patcher.model.streaming.streamer.whole_blocks
    assert torch.equal(sample(other), plain)
    assert not patcher.model.streaming.streamer.whole_blocks


def test_clones_share_what_was_put_on_the_model(loaded, copies):
    first = loaded(1, 1)
    shifted(first)
    assert first.clone().model._shifted_by == first.clone().clone().model._shifted_by == 3.0


def test_models_in_turn_have_their_own_object_patches(loaded, sample, copies):
    one, two = loaded(1, 1), loaded(3, 3)
    plain, patched = sample(one), sample(shifted(one))
    block = "diffusion_model.double_blocks.0"
    calls = []

    class Counting(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, *args, **kwargs):
            calls.append(1)
            return self.block(*args, **kwargs)

    assert one.get_model_object("model_sampling") is not two.get_model_object("model_sampling")
    counting = two.clone()
    counting.add_object_patch(block, Counting(two.get_model_object(block)))
    again = shifted(loaded(1, 1))
    for _ in range(2):
        assert torch.equal(sample(counting), plain)
        assert not isinstance(loaded(2, 2).get_model_object(block), Counting), "another's patch is no original"
        assert calls
        calls.clear()
        assert torch.equal(sample(again), patched)
        assert torch.equal(sample(two), plain)
        assert torch.equal(sample(one), plain)
        assert not calls


def test_comfyui_has_one_entry_and_knows_what_is_on_the_device(loaded, sample, copies):
    one, two = loaded(1, 1), loaded(3, 3)
    sample(one)
    sample(shifted(two))
    (entry,) = [entry for entry in comfy.model_management.current_loaded_models if entry.model.is_clone(one)]
    held = two.model.streaming.streamer.device_bytes
    assert one.loaded_size() == two.loaded_size() == entry.model_loaded_memory() >= held > 0
    del two
    gc.collect()
    (entry,) = [entry for entry in comfy.model_management.current_loaded_models if entry.model.is_clone(one)]
    assert entry.real_model() is not None
    assert entry.model_loaded_memory() == one.loaded_size() >= held
    comfy.model_management.unload_all_models()
    assert one.loaded_size() == one.model.streaming.streamer.device_bytes == 0
    sample(one)
    assert one.loaded_size() > 0


def test_a_model_that_is_loaded_once_more_for_another_device_is_not_kept_by_the_first(load, dense, sample, copies):
    first, second = load(1, 1), stream_model(dense, Residency(), None)
    second.parent.parent = first  # as ComfyUI has it
    sample(second)
    assert second.parent.keeps is second.model
    assert first.keeps is first.parent.keeps is None


def test_patches_of_the_models_in_turn_reach_tensors_of_no_block(load, sample, copies):
    one, two = load(1, 1).clone(), load(2, 2)
    plain = sample(two)
    bias = one.model.diffusion_model.img_in.bias
    one.add_patches({"diffusion_model.img_in.bias": ("diff", (torch.ones_like(bias),))})
    patched = sample(one)
    assert not torch.equal(patched, plain)
    assert torch.equal(sample(two), plain)
    assert torch.equal(sample(one), patched)
