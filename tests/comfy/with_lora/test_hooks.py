"""LoRA by hooks: other strengths for each conditioning and each step, as stock ComfyUI computes them."""

import dataclasses
import itertools

import comfy.hooks
import comfy.model_patcher
import loras
import pytest
import torch
from make_checkpoint import Recipe, make_checkpoint

from flux_nf4.checkpoints import load_transformer, streamed
from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue
from flux_nf4.offload.comfyui.patching import Patching
from flux_nf4.offload.plan import Residency

CPU = torch.device("cpu")
RECIPE = Recipe(double_blocks=2, single_blocks=3, hidden=256, unet_only=True)

BOUND = 1e-5
"""Relative; found: below 1e-6."""


@pytest.fixture
def files(shapes):
    adapters = [loras.adapters(f"diffusion_model.{name}", shapes[name]) for name in list(shapes)[:12]]
    return {
        "low rank": loras.kohya(shapes, rank=8),
        "dense": {key: value for each in adapters for key, value in each["loha"].items()},
        "biases": {key: value for each in adapters for key, value in each["difference"].items()},
    }


def hooked(conditioning, *groups):
    for group in groups:
        conditioning = comfy.hooks.set_hooks_for_conditioning(conditioning, group)
    return conditioning


def with_keyframes(group, *strengths):
    """Each strength from its share of the steps on."""
    frames = comfy.hooks.HookKeyframeGroup()
    for index, strength in enumerate(strengths):
        frames.add(comfy.hooks.HookKeyframe(strength, start_percent=index / len(strengths)))
    group.set_keyframes_on_hooks(frames)
    return group


@pytest.fixture
def difference(load, twin, sample, with_lora, files):
    """A function: the relative difference to stock ComfyUI of a sampling with these conditionings."""

    def difference(steps=2, lora=None, patcher=None, **conds):
        expected, found = (
            sample(p if lora is None else with_lora(p, files[lora], 0.5), steps, cfg=3.0, **conds)
            for p in (twin, patcher or load(0, 1))
        )
        return ((found - expected).norm() / expected.norm()).item()

    return difference


@pytest.mark.parametrize("kind", ["low rank", "dense", "biases"])
@pytest.mark.parametrize("lora", [None, "low rank"])
def test_a_hook_counts_only_for_its_conditioning(kind, lora, files, conditioning, difference, sample, load, copies):
    hook = comfy.hooks.create_hook_lora(files[kind], 0.8, 0.0)
    conds = {"positive": hooked(conditioning(1), hook), "negative": conditioning(2)}
    assert difference(lora=lora, **conds) < BOUND
    other = {"positive": conditioning(1), "negative": hooked(conditioning(2), hook)}
    assert (sample(load(), cfg=3.0, **conds) - sample(load(), cfg=3.0, **other)).norm() > 0.1


@pytest.mark.parametrize("kind", ["low rank", "dense"])
def test_keyframes_change_the_strength_from_step_to_step(kind, files, conditioning, difference, copies):
    hook = with_keyframes(comfy.hooks.create_hook_lora(files[kind], 1.0, 0.0), 0.2, 1.0, 0.0, 0.6)
    assert difference(4, positive=hooked(conditioning(1), hook), negative=conditioning(2)) < BOUND


def test_streamed_is_resident_to_the_bit(files, conditioning, load, sample, with_lora, shapes, copies):
    hook = with_keyframes(comfy.hooks.create_hook_lora(files["low rank"] | files["biases"], 1.0, 0.0), 0.2, 1.0)
    conds = {"positive": hooked(conditioning(1), hook), "negative": conditioning(2)}
    latents = []
    for double, single in itertools.product(range(3), range(4)):
        patcher = load(double, single)
        for seed in range(4):
            patcher = with_lora(patcher, loras.kohya(shapes, seed=str(seed)), 0.2)
        latents.append(sample(patcher, cfg=3.0, **conds))
    assert all(torch.equal(latent, latents[0]) for latent in latents)


def test_the_weights_of_another_model_by_a_hook_are_as_in_stock_comfyui(conditioning, difference, shapes, copies):
    weights = {
        f"diffusion_model.{name}.weight": loras.random(name, *shape, scale=0.05)
        for name, shape in list(shapes.items())[:4]
    }
    hook = comfy.hooks.create_hook_model_as_lora(weights, None, 0.7, 0.0)
    assert difference(positive=hooked(conditioning(1), hook), negative=conditioning(2)) < BOUND


def test_the_weights_of_another_4bit_model_by_a_hook_are_those_of_its_dense_twin(
    conditioning, load, twin, sample, stock_model, config, tmp_path, copies
):
    recipe = dataclasses.replace(RECIPE, seed=7)
    make_checkpoint(tmp_path / "other.safetensors", recipe)
    other = streamed(load_transformer(read_catalogue(tmp_path / "other.safetensors")), Residency(), node_id=None)
    dense = comfy.model_patcher.ModelPatcher(stock_model(config, tmp_path / "twin.safetensors", recipe), CPU, CPU)

    of_other, of_dense = map(comfy.hooks.get_patch_weights_from_model, (other, dense))
    assert of_other.keys() == of_dense.keys()

    def latents(patcher, weights):
        hook = comfy.hooks.create_hook_model_as_lora(weights, None, 0.5, 0.0)
        return sample(patcher, 1, positive=hooked(conditioning(1), hook), negative=conditioning(2))

    expected, found = latents(twin, of_dense), latents(load(0, 1), of_other)
    assert (expected - sample(twin, 1)).norm() > 0.1 * expected.norm()
    assert (found - expected).norm() < BOUND * expected.norm()


def test_several_hooks_in_several_groups(files, conditioning, difference, copies):
    first = comfy.hooks.create_hook_lora(files["low rank"], 0.7, 0.0)
    second = comfy.hooks.create_hook_lora(files["dense"], 0.9, 0.0)
    third = with_keyframes(comfy.hooks.create_hook_lora(files["biases"], 1.0, 0.0), 1.0, 0.3)
    both, one = hooked(conditioning(1), first, second), hooked(conditioning(2), second, third)
    assert difference(lora="low rank", positive=both, negative=one) < BOUND


def test_hooks_leave_nothing_behind(files, conditioning, load, sample, copies):
    patcher = load(0, 1)
    expected = sample(patcher)
    hook = with_keyframes(comfy.hooks.create_hook_lora(files["low rank"] | files["biases"], 1.0, 0.0), 1.0, 0.5)
    with_hook = sample(patcher, positive=hooked(conditioning(), hook))
    assert not torch.equal(with_hook, expected)
    assert torch.equal(sample(patcher), expected)
    assert torch.equal(sample(patcher, positive=hooked(conditioning(), hook)), with_hook)


def test_switching_hooks_brings_new_scales_and_nothing_else(files, conditioning, load, sample, copies, monkeypatch):
    patcher = load(0, 1)
    streaming = patcher.model.streaming
    apply, given = streaming.patching.apply, []

    def record(*args, **options):
        given.append({m: dict(tensors) for m, tensors in apply(*args, **options).items()})
        return given[-1]

    monkeypatch.setattr(streaming.patching, "apply", record)
    hook = with_keyframes(comfy.hooks.create_hook_lora(files["low rank"], 1.0, 0.0), 1.0, 0.5)
    sample(patcher, cfg=3.0, positive=hooked(conditioning(1), hook), negative=conditioning(2))
    during = [tensors for tensors in given if tensors]
    assert len(during) >= 4, "two conditionings in two steps"
    changed = [
        {name for module in after for name, tensor in after[module].items() if before[module].get(name) is not tensor}
        for before, after in itertools.pairwise(during)
    ]
    assert set().union(*changed) == {"lora_scale"}


def test_a_sampling_without_hooks_applies_patches_once(
    files, conditioning, load, sample, with_lora, copies, monkeypatch
):
    patcher = with_lora(load(), files["dense"], 0.5)
    expected = sample(patcher)
    applied = []
    apply = Patching.apply
    monkeypatch.setattr(Patching, "apply", lambda *given, **named: applied.append(1) or apply(*given, **named))
    assert torch.equal(sample(patcher), expected)
    assert applied == [1], "when it was loaded, and not again when it ended"


def test_hooks_that_could_not_be_applied_are_taken_back(files, conditioning, load, sample, copies, monkeypatch):
    patcher = load()
    expected = sample(patcher)
    hook = comfy.hooks.create_hook_lora(files["low rank"], 0.8, 0.0)
    apply = Patching.apply
    calls = []

    def fail_late(*given, **named):
        extras = apply(*given, **named)
        calls.append(1)
        if len(calls) == 2:  # after that of loading
            raise torch.OutOfMemoryError
        return extras

    monkeypatch.setattr(Patching, "apply", fail_late)
    with pytest.raises(torch.OutOfMemoryError):
        sample(patcher, positive=hooked(conditioning(), hook))
    assert torch.equal(sample(patcher), expected)
