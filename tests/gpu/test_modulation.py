"""The modulation is computed ahead, on a GPU: the bits of before, its weights once, and no more waiting than that."""

import comfy.model_management
import comfy.sd
import loras
import pytest
import torch
from gpu_models import DEVICE

from flux_nf4.offload.ahead import Ahead


@pytest.fixture
def as_before(monkeypatch):
    """A function: what ``make`` gives where nothing is computed ahead."""

    def run(make):
        with monkeypatch.context() as patched:
            patched.setattr(Ahead, "output", lambda ahead, index, vector: ahead.blocks[index]((vector,))[0])
            return make()

    return run


@pytest.mark.parametrize(("cfg", "batch"), [(1.0, 1), (4.0, 1), (1.0, 2)])
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "dpmpp_sde", "uni_pc"])
def test_latents_are_those_of_before(sampler, cfg, batch, model, as_before):
    given = {"sampler": sampler, "cfg": cfg, "batch": batch, "steps": 4}
    for patcher in (model.with_counts(0, 0), model.resident()):
        expected = as_before(lambda patcher=patcher: model.sample(patcher, **given))
        assert torch.equal(model.sample(patcher, **given), expected)


def test_a_lora_on_the_modulation_is_as_before(model, as_before):
    shapes = {name: shape for name, shape in loras.linear_shapes(model.loaded.model).items() if "mod" in name}
    for strength in (0.3, 0.8):
        patcher, _ = comfy.sd.load_lora_for_models(
            model.with_counts(0, 0), None, loras.kohya(shapes, 8, alpha=8), strength, 0
        )
        expected = as_before(lambda patcher=patcher: model.sample(patcher, steps=3))
        assert torch.equal(model.sample(patcher, steps=3), expected)


def test_the_weights_pass_once_and_the_host_waits_once_a_forward(model, monkeypatch):
    patcher = model.with_counts(0, 0)
    model.sample(patcher, steps=2)
    modulation = patcher.model.streaming.modulation
    blocks, found = len(modulation.ahead.blocks), []
    look, foretell = Ahead._run_of, modulation.steps.foretell
    monkeypatch.setattr(Ahead, "_run_of", lambda ahead, vector: found.append("look") or look(ahead, vector))
    computed = []
    compute = Ahead._compute
    monkeypatch.setattr(Ahead, "_compute", lambda *given: computed.append(1) or compute(*given))
    model.sample(patcher, steps=6)
    assert len(computed) == blocks
    assert found == ["look"] * 6
    assert foretell(torch.zeros(1, 1, device=DEVICE), 1) is None  # nothing of the sampling is left


def test_what_is_computed_ahead_goes_with_the_sampling(model):
    patcher = model.resident()
    model.sample(patcher, steps=2)
    held = torch.cuda.memory_allocated(DEVICE)
    model.sample(patcher, steps=12)
    assert torch.cuda.memory_allocated(DEVICE) == held
    comfy.model_management.unload_all_models()
