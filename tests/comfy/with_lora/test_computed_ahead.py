"""Patches on the modulation, which is computed ahead: whatever changes them, outputs of before are not used."""

import comfy.hooks
import loras
import pytest
import torch
from computed_ahead import as_before


@pytest.fixture
def files(shapes):
    of_modulation = {name: shape for name, shape in shapes.items() if "mod" in name}
    adapters = [loras.adapters(f"diffusion_model.{name}", shape) for name, shape in of_modulation.items()]
    return {
        "low rank": loras.kohya(of_modulation, rank=8),
        "dense": {key: value for each in adapters for key, value in each["loha"].items()},
        "biases": {key: value for each in adapters for key, value in each["difference"].items()},
    }


@pytest.mark.parametrize("kind", ["low rank", "dense", "biases"])
def test_a_lora_on_the_modulation_is_as_before(kind, files, load, sample, with_lora, copies):
    patcher = load(0, 1)
    plain = sample(patcher, steps=3)
    patched = [with_lora(patcher, files[kind], strength) for strength in (0.3, 0.9)]
    found = [sample(each, steps=3) for each in patched]
    assert not torch.equal(found[0], plain)
    assert not torch.equal(found[0], found[1])
    assert torch.equal(sample(patcher, steps=3), plain)
    expected = as_before(lambda: [sample(each, steps=3) for each in patched])
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("as_hook", [False, True])
def test_other_loras_on_weights_that_stay_copy_only_their_own_tensors(
    as_hook, shapes, load, sample, with_lora, conditioning, copies
):
    of_modulation = {name: shape for name, shape in shapes.items() if "mod" in name}
    first, other = (loras.kohya(of_modulation, rank=8, seed=seed) for seed in "ab")
    patcher = load(2, 3)
    sample(with_lora(patcher, first))
    streaming = patcher.model.streaming
    assert streaming.modulation_stays
    weights = sum(size.streamed for size in streaming.modulation.streamer.sizes())
    copies.nbytes = 0
    if as_hook:
        hooks = comfy.hooks.create_hook_lora(other, 1.0, 0.0)
        sample(patcher, positive=comfy.hooks.set_hooks_for_conditioning(conditioning(1), hooks))
    else:
        sample(with_lora(patcher, other))
    assert streaming.modulation_stays
    assert 0 < copies.nbytes < weights / 2


def test_where_new_loras_have_no_room_beside_weights_that_stay_these_go_and_no_block(
    shapes, load, sample, with_lora, copies, monkeypatch
):
    of_modulation = {name: shape for name, shape in shapes.items() if "mod" in name}
    small, large = loras.kohya(of_modulation, rank=8, seed="a"), loras.kohya(shapes, rank=16, seed="b")
    patcher = load(2, 3)
    other = with_lora(patcher, large)
    expected = sample(other)
    streaming, empty = patcher.model.streaming, copies.empty
    streamers = streaming.streamers
    room = sum(streamer.device_bytes for streamer in streamers) - 1
    sample(with_lora(patcher, small))
    assert streaming.modulation_stays

    def within_room(nbytes):
        if nbytes + sum(streamer.device_bytes for streamer in streamers) > room:
            raise torch.OutOfMemoryError("fake")
        return empty(nbytes)

    monkeypatch.setattr(copies, "empty", within_room)
    assert torch.equal(sample(other), expected)
    assert not streaming.streamer.plan.streamed
    assert not streaming.modulation_stays


@pytest.mark.parametrize("kind", ["low rank", "dense"])
def test_a_hook_whose_strength_changes_in_the_midst_is_as_before(kind, files, load, sample, conditioning):
    hook = comfy.hooks.create_hook_lora(files[kind], 1.0, 0.0)
    frames = comfy.hooks.HookKeyframeGroup()
    for index, strength in enumerate((0.2, 1.0, 0.0)):
        frames.add(comfy.hooks.HookKeyframe(strength, start_percent=index / 3))
    hook.set_keyframes_on_hooks(frames)
    positive = comfy.hooks.set_hooks_for_conditioning(conditioning(1), hook)
    given = {"positive": positive, "negative": conditioning(2), "cfg": 3.0, "steps": 4}
    found = sample(load(), **given)
    assert not torch.equal(found, sample(load(), **{**given, "positive": conditioning(1)}))
    assert torch.equal(as_before(lambda: sample(load(), **given)), found)
