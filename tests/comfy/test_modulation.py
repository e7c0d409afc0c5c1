"""The modulation is computed ahead: latents have the same bits as without that, and its weights pass once."""

import pytest
import torch
from tiny_flux import HIDDEN

from flux_nf4.offload.ahead import AHEAD, Ahead

DOUBLES, SINGLES = 8, 10
SAMPLERS = ("euler", "heun", "dpmpp_2m", "dpmpp_sde", "dpm_2", "lcm", "uni_pc", "res_multistep", "er_sde")


@pytest.fixture
def as_before(monkeypatch):
    """A function: what ``make`` gives where nothing is computed ahead, as each forward of the model computes it."""

    def run(make):
        with monkeypatch.context() as patched:
            patched.setattr(Ahead, "output", lambda ahead, index, vector: ahead.blocks[index]((vector,))[0])
            return make()

    return run


@pytest.fixture
def computed(monkeypatch):
    """The numbers of forwards that the first layer was computed for, call by call."""
    numbers = []
    compute = Ahead._compute

    def count(ahead, index, run):
        if index == 0:
            numbers.append(len(run.forwards) - run.now)
        return compute(ahead, index, run)

    monkeypatch.setattr(Ahead, "_compute", count)
    return numbers


def modulation_bytes(patcher):
    return sum(size.streamed for size in patcher.model.streaming.modulation.streamer.sizes())


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_latents_are_those_of_before(sampler, cfg, batch, load, sample, conditioning, as_before, copies):
    latent = torch.zeros(batch, 16, 8, 8)
    given = {"sampler": sampler, "cfg": cfg, "latent": latent, "steps": 4}
    conds = {"positive": conditioning(1), "negative": conditioning(2)}
    expected = as_before(lambda: sample(load(4, 5), **given, **conds))
    assert torch.equal(sample(load(), **given, **conds), expected)


@pytest.mark.parametrize(("double", "single"), [(0, 0), (3, 4), (DOUBLES, SINGLES)])
def test_the_weights_pass_once_for_all_steps_that_are_computed_at_once(double, single, load, sample, copies, as_before):
    patcher = load(double, single)
    sample(patcher, steps=1)
    plan, weights = patcher.model.streaming.streamer.plan, modulation_bytes(patcher)
    for steps, passes in ((1, 1), (4, 1), (AHEAD, 1), (AHEAD + 1, 2)):
        copies.nbytes = 0
        sample(patcher, steps=steps)
        assert copies.nbytes == steps * plan.bytes_per_forward + passes * weights
    copies.nbytes = 0
    as_before(lambda: sample(patcher, steps=4))
    assert copies.nbytes == 4 * (plan.bytes_per_forward + weights)


def test_the_blocks_records_and_plan_are_without_it(load):
    streaming = load().model.streaming
    weights = (DOUBLES * 12 + SINGLES * 3) * HIDDEN**2
    held = sum(block.own.layout.nbytes for block in streaming.modulation.streamer.blocks)
    assert held == pytest.approx(weights * 0.5625, rel=0.05)
    linears = {module for block in streaming.streamer.blocks for module in block.module.modules()}
    assert streaming.modulation.ahead.modules < linears
    assert not any(streaming.streamer.has(module) for module in streaming.modulation.ahead.modules)
    assert all(streaming.modulation.streamer.has(module) for module in streaming.modulation.ahead.modules)
