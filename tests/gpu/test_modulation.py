"""The modulation is computed ahead, on a GPU: the bits of before, its weights once, and no more waiting than that."""

import comfy.model_management
import comfy.sd
import loras
import pytest
import torch
from computed_ahead import as_before
from gpu_models import DEVICE, requested_bytes

from flux_nf4.offload.ahead import ENOUGH, Ahead, Guesses
from flux_nf4.offload.plan import Residency


@pytest.mark.parametrize(("cfg", "batch"), [(1.0, 1), (4.0, 1), (1.0, 2)])
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "dpmpp_sde", "uni_pc"])
def test_latents_are_those_of_before(sampler, cfg, batch, model):
    given = {"sampler": sampler, "cfg": cfg, "batch": batch, "steps": 4}
    for patcher in (model.with_counts(0, 0), model.half(), model.resident()):
        expected = as_before(lambda patcher=patcher: model.sample(patcher, **given))
        assert torch.equal(model.sample(patcher, **given), expected)


def test_a_lora_on_the_modulation_is_as_before(model):
    shapes = {name: shape for name, shape in loras.linear_shapes(model.loaded.model).items() if "mod" in name}
    for strength in (0.3, 0.8):
        patcher, _ = comfy.sd.load_lora_for_models(
            model.with_counts(0, 0), None, loras.kohya(shapes, 8, alpha=8), strength, 0
        )
        expected = as_before(lambda patcher=patcher: model.sample(patcher, steps=3))
        assert torch.equal(model.sample(patcher, steps=3), expected)


def test_the_weights_pass_once_and_after_some_steps_no_forward_waits_for_the_one_before(model, monkeypatch):
    patcher = model.with_counts(0, 0)
    model.sample(patcher, steps=2)
    modulation = patcher.model.streaming.modulation
    blocks, found, computed = len(modulation.ahead.blocks), [], []
    find, guess, foretell, compute = Ahead._find, Guesses.add, modulation.steps.foretell, Ahead._compute
    monkeypatch.setattr(Ahead, "_find", lambda *given: found.append("waits") or find(*given))
    monkeypatch.setattr(Guesses, "add", lambda *given: found.append("guesses") or guess(*given))
    monkeypatch.setattr(Ahead, "_compute", lambda *given: computed.append(1) or compute(*given))
    model.sample(patcher, steps=8)
    assert len(computed) == blocks
    assert found == ENOUGH * ["waits"] + (7 - ENOUGH) * ["guesses"]
    assert foretell(torch.zeros(1, 1, device=DEVICE), 1) is None  # nothing of the sampling is left


def test_a_wrong_guess_is_told_and_a_right_one():
    here, there = torch.zeros(8, device=DEVICE), torch.ones(8, device=DEVICE)
    for is_right in (True, False):
        guesses = Guesses()
        torch.cuda._sleep(20_000_000)  # the answer is not there yet
        guesses.add((here == (here if is_right else there)).all())
        assert guesses.are_right() == is_right


def test_what_is_computed_ahead_goes_with_the_sampling(model):
    patcher = model.with_counts(0, 0)
    model.sample(patcher, steps=2)
    held = requested_bytes()
    model.sample(patcher, steps=12)
    assert requested_bytes() == held
    comfy.model_management.unload_all_models()


def test_weights_that_stay_need_no_copies_and_no_waiting(model, monkeypatch):
    patcher = model.resident()
    expected = model.sample(patcher)
    streaming = patcher.model.streaming
    assert streaming.modulation_stays
    monkeypatch.setattr(Ahead, "_run_of", lambda *_: pytest.fail("here the host waits"))
    monkeypatch.setattr(streaming.modulation.streamer._copies, "copy", lambda *_, **__: pytest.fail("a copy"))
    assert torch.equal(model.sample(patcher), expected)


def test_weights_that_stay_are_given_up_first_and_the_next_sampling_brings_them_back(model):
    patcher = model.resident()
    expected = model.sample(patcher)
    streaming, held = patcher.model.streaming, requested_bytes()
    freed = patcher.partially_unload(torch.device("cpu"), 1)
    assert abs(held - requested_bytes() - freed) <= 512 * len(streaming.modulation.streamer.blocks)
    assert not streaming.modulation_stays
    assert streaming.streamer.plan.streamed == ()
    assert torch.equal(model.sample(patcher), expected)
    assert streaming.modulation_stays
    assert requested_bytes() == held


def test_a_budget_without_room_for_them_has_them_pass_beside_resident_blocks(model):
    patcher = model.resident()
    expected = model.sample(patcher)
    streaming = patcher.model.streaming
    patcher.residency = Residency(budget_bytes=streaming.needed_bytes + streaming.streamer.plan.device_bytes)
    assert torch.equal(model.sample(patcher, steps=2), expected)
    assert not streaming.modulation_stays
    assert streaming.streamer.plan.streamed == ()
