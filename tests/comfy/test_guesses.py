"""Forwards that do not wait to learn which step they are: always right, and never twice where that could be seen."""

import functools

import comfy.k_diffusion.sampling
import comfy.ldm.flux.model
import comfy.patcher_extension
import comfy.samplers
import pytest
import torch
from computed_ahead import as_before

from flux_nf4.offload.ahead import ENOUGH, Guesses
from flux_nf4.offload.comfyui.coming_steps import ComingSteps
from flux_nf4.offload.turns import turns


@pytest.fixture
def guessed(monkeypatch):
    """One item for each forward that has guessed."""
    made, add = [], Guesses.add
    monkeypatch.setattr(Guesses, "add", lambda guesses, is_right: made.append(1) or add(guesses, is_right))
    return made


@pytest.fixture
def forwards(monkeypatch):
    """One item for each forward of the transformer."""
    made, begins = [], ComingSteps._forward_begins
    monkeypatch.setattr(ComingSteps, "_forward_begins", lambda steps, input: made.append(1) or begins(steps, input))
    return made


@pytest.mark.parametrize("sampler", comfy.samplers.KSampler.SAMPLERS)
def test_no_forward_of_a_sampler_runs_twice(sampler, load, sample, copies, guessed, forwards):
    given = {"sampler": sampler, "steps": 9}
    expected = as_before(lambda: sample(load(1, 1), **given))
    count = len(forwards)
    assert not guessed
    assert torch.equal(sample(load(), **given), expected)
    assert len(forwards) == 2 * count
    if sampler == "euler":
        assert len(guessed) == 9 - (ENOUGH + 1)


def with_a_leap(model, x, sigmas, extra_args=None, **_):
    """A sampler that leaves two steps out."""
    for i in LEAP:
        denoised = model(x, sigmas[i] * x.new_ones(len(x)), **(extra_args or {}))
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


LEAP = (0, 1, 2, 3, 4, 7, 8)


def test_a_forward_for_which_another_was_taken_runs_again(load, sample, copies, guessed, forwards, monkeypatch):
    monkeypatch.setattr(comfy.k_diffusion.sampling, "sample_euler", with_a_leap)
    expected = as_before(lambda: sample(load(1, 1), steps=9))
    assert len(forwards) == len(LEAP)
    for number in (1, 2):  # the next sampling guesses again
        assert torch.equal(sample(load(), steps=9), expected)
        assert len(guessed) == 2 * number, "step 4, and step 5 where there was none"
        assert len(forwards) == len(LEAP) + number * (len(LEAP) + 1)


def counting(number=[0]):  # noqa: B006  it is what is tested: something that is kept between forwards
    number[0] += 1
    return 1 + number[0] / 8


def wrapped(executor, *args, **kwargs):
    return executor(*args, **kwargs) * counting()


def with_a_wrapper_of_the_model(patcher, _):
    patcher.add_wrapper(comfy.patcher_extension.WrappersMP.APPLY_MODEL, wrapped)


def with_a_wrapper_of_the_transformer(patcher, _):
    patcher.add_wrapper(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, wrapped)


def with_a_patch_in_a_block(patcher, _):
    patcher.set_model_patch_replace(lambda args, extra: {"img": args["img"] * counting()}, "dit", "single_block", 1)


def with_a_patch(patcher, _):
    if not hasattr(patcher, "set_model_post_input_patch"):
        pytest.skip("this ComfyUI has no such patches")
    patcher.set_model_post_input_patch(lambda given: {**given, "img": given["img"] * counting()})


def with_a_wrapper_of_the_function(patcher, _):
    patcher.set_model_unet_function_wrapper(
        lambda apply, given: apply(given["input"], given["timestep"], **given["c"]) * counting()
    )


def of_another_package(method):
    """What gives other values each time, in place of a method of ComfyUI's."""

    def other(*args, **given):
        return method(*args, **given) * counting()

    other.__module__ = "another.package"
    return other


def with_another_forward(patcher, monkeypatch):
    kind = comfy.ldm.flux.model.Flux
    monkeypatch.setattr(kind, "forward_orig", of_another_package(kind.forward_orig))


def with_another_forward_of_this_model(patcher, monkeypatch):
    transformer = patcher.model.diffusion_model
    monkeypatch.setattr(transformer, "forward_orig", of_another_package(transformer.forward_orig))


def with_a_hook(patcher, monkeypatch):
    transformer = patcher.model.diffusion_model
    handle = transformer.register_forward_hook(lambda module, args, output: output * counting())
    monkeypatch.setattr(transformer, "forward_hook_of_this_test", handle, raising=False)


def with_another_class(patcher, monkeypatch):
    block = patcher.model.diffusion_model.single_blocks[1]

    class Other(type(block)):
        forward = of_another_package(type(block).forward)

    monkeypatch.setattr(block, "__class__", Other)


def with_another_block(patcher, monkeypatch):
    transformer = patcher.model.diffusion_model

    class Other(torch.nn.Module):
        def forward(self, img, *args, **given):
            return img * counting()

    monkeypatch.setattr(transformer, "single_blocks", torch.nn.ModuleList([Other()]))


COMPANY = (
    with_a_wrapper_of_the_model,
    with_a_wrapper_of_the_transformer,
    with_a_patch_in_a_block,
    with_a_patch,
    with_a_wrapper_of_the_function,
    with_another_forward,
    with_another_forward_of_this_model,
    with_a_hook,
    with_another_class,
    with_another_block,
)


@pytest.mark.parametrize("add", COMPANY, ids=lambda add: add.__name__.removeprefix("with_"))
def test_no_forward_runs_twice_where_others_may_keep_something_of_it(
    add, load, sample, copies, guessed, forwards, monkeypatch
):
    monkeypatch.setattr(comfy.k_diffusion.sampling, "sample_euler", with_a_leap)
    found = []
    for is_before in (True, False):
        counting.__defaults__[0][0] = 0
        with monkeypatch.context() as patch:
            patcher = load()
            add(patcher, patch)
            make = functools.partial(sample, patcher, steps=9)
            found.append(as_before(make) if is_before else make())
            patcher.model.diffusion_model._forward_hooks.clear()
    assert not guessed
    assert len(forwards) == 2 * len(LEAP)
    assert torch.equal(*found)


def test_other_threads_have_the_turn_while_the_host_waits(load, sample, copies, monkeypatch):
    has_turn, are_right = [], Guesses.are_right
    monkeypatch.setattr(Guesses, "are_right", lambda guesses: has_turn.append(turns._has_it) or are_right(guesses))
    sample(load(), steps=6)
    assert has_turn == [False] * 6


def test_easycache_gives_what_it_gives_without_looking_ahead(load, sample, copies, guessed):
    """It leaves steps out, so that a guess would be wrong, and keeps what a forward has computed."""
    nodes_easycache = pytest.importorskip("comfy_extras.nodes_easycache")
    found = []
    for make in (as_before, lambda make: make()):
        (patcher,) = nodes_easycache.EasyCacheNode.execute(load(), 0.5, 0.15, 0.95, False).args
        found.append(make(lambda patcher=patcher: sample(patcher, steps=20)))
    assert torch.equal(*found)
    assert not guessed
