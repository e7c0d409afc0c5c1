"""Forwards that do not wait to learn which step they are: always right, and never twice where that could be seen."""

import functools

import comfy.k_diffusion.sampling
import comfy.samplers
import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from computed_ahead import as_before
from intruders import INTRUDERS, begin_to_count

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


@pytest.mark.parametrize("sampler", ["euler", "heunpp2", "dpmpp_2s_ancestral_cfg_pp", "dpm_2_ancestral"])
def test_no_forward_runs_twice_where_two_prompts_run_in_turn(
    sampler, load, sample, conditioning, copies, guessed, forwards, monkeypatch
):
    monkeypatch.setattr("comfy.samplers.can_concat_cond", lambda one, other: one is other)
    given = {"cfg": 4.0, "steps": 16, "positive": conditioning(1), "negative": conditioning(2), "sampler": sampler}
    expected = as_before(lambda: sample(load(1, 1), **given))
    count = len(forwards)
    assert torch.equal(sample(load(), **given), expected)
    assert len(forwards) == 2 * count
    assert bool(guessed) == (sampler == "euler")


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


@pytest.mark.parametrize("add", INTRUDERS, ids=lambda add: add.__name__)
def test_no_forward_runs_twice_where_others_may_keep_something_of_it(
    add, load, sample, copies, guessed, forwards, monkeypatch
):
    monkeypatch.setattr(comfy.k_diffusion.sampling, "sample_euler", with_a_leap)
    found = []
    for is_before in (True, False):
        begin_to_count()
        with monkeypatch.context() as patch:
            patcher = load()
            take_away = add(patcher, patch)
            make = functools.partial(sample, patcher, steps=9)
            try:
                found.append(as_before(make) if is_before else make())
            finally:
                if take_away is not None:
                    take_away.remove()
    assert not guessed
    assert len(forwards) == 2 * len(LEAP)
    assert torch.equal(*found)


def test_a_method_that_is_added_to_all_modules_is_no_company(load, sample, copies, guessed, monkeypatch):
    """As transformers does when it loads a model."""
    monkeypatch.setattr(torch.nn.Module, "smart_apply", begin_to_count, raising=False)
    sample(load(), steps=7)
    assert len(guessed) == 7 - (ENOUGH + 1)


def test_a_compiled_model_guesses(load, sample, copies, guessed):
    patcher = load()
    set_torch_compile_wrapper(model=patcher, backend="eager", keys=["diffusion_model.single_blocks.0"])
    expected = as_before(lambda: sample(patcher, steps=7))
    assert torch.equal(sample(patcher, steps=7), expected)
    assert len(guessed) == 7 - (ENOUGH + 1)


def test_a_forward_that_runs_out_of_memory_runs_once_more_and_no_oftener(load, sample, copies, guessed, forwards):
    patcher, failures = load(1, 1), [torch.OutOfMemoryError("fake")]
    expected, count = sample(patcher, steps=7), len(forwards)
    del forwards[:]

    def fail(*_):
        if failures and len(forwards) == 6:
            raise failures.pop()

    layer = patcher.model.diffusion_model.double_blocks[1].img_attn.proj
    fail.__globals__["__name__"], before = "flux_nf4.offload.a_test", fail.__globals__["__name__"]
    handle = layer.register_forward_pre_hook(fail)
    try:
        assert torch.equal(sample(patcher, steps=7), expected)
    finally:
        fail.__globals__["__name__"] = before
        handle.remove()
    assert not failures
    assert len(forwards) == count + 1


def test_other_threads_have_the_turn_while_the_host_waits(load, sample, copies, monkeypatch):
    has_turn, are_right = [], Guesses.are_right
    monkeypatch.setattr(Guesses, "are_right", lambda guesses: has_turn.append(turns._has_it) or are_right(guesses))
    sample(load(), steps=6)
    assert has_turn == [False] * (6 - (ENOUGH + 1))


def test_easycache_gives_what_it_gives_without_looking_ahead(load, sample, copies, guessed):
    """It leaves steps out, so that a guess would be wrong, and keeps what a forward has computed."""
    nodes_easycache = pytest.importorskip("comfy_extras.nodes_easycache")
    found = []
    for make in (as_before, lambda make: make()):
        (patcher,) = nodes_easycache.EasyCacheNode.execute(load(), 0.5, 0.15, 0.95, False).args
        found.append(make(lambda patcher=patcher: sample(patcher, steps=20)))
    assert torch.equal(*found)
    assert not guessed
