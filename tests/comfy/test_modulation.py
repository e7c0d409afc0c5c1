"""The modulation is computed ahead: latents have the same bits as without that, and its weights pass once."""

import weakref

import comfy.model_detection
import comfy.supported_models
import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from make_checkpoint import Recipe, make_checkpoint
from tiny_flux import HIDDEN, tiny_config

from flux_nf4.checkpoints import load_transformer
from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue
from flux_nf4.offload import ahead as ahead_module
from flux_nf4.offload.ahead import AHEAD, Ahead

DOUBLES, SINGLES = 8, 10
FILL = Recipe(double_blocks=2, single_blocks=2, hidden=HIDDEN, in_channels=384, unet_only=True)
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
    for module in streaming.modulation.ahead.modules:
        assert streaming.streamer._places.of(module) is None
        assert streaming.modulation.streamer._places.of(module) is not None


def test_a_step_that_comes_twice_is_computed_once(load, sample, computed):
    """heun evaluates each sigma but the first twice."""
    sample(load(), sampler="heun", steps=4)
    assert computed == [4]


def test_a_timestep_between_the_steps_is_computed_when_it_comes(load, sample, computed):
    sample(load(), sampler="dpm_2", steps=4)
    assert computed == [4, 1, 1, 1]


def test_two_prompts_that_run_one_after_the_other_are_computed_ahead_each(
    load, sample, conditioning, computed, as_before, monkeypatch
):
    monkeypatch.setattr("comfy.samplers.can_concat_cond", lambda one, other: one is other)
    given = {"cfg": 4.0, "steps": 4, "positive": conditioning(1), "negative": conditioning(2)}
    found = sample(load(), **given)
    assert computed == [4, 4]
    assert torch.equal(as_before(lambda: sample(load(), **given)), found)


def test_more_prompts_than_there_is_room_for_are_computed_when_they_come(
    load, sample, conditioning, computed, as_before, monkeypatch
):
    monkeypatch.setattr("comfy.samplers.can_concat_cond", lambda one, other: one is other)
    monkeypatch.setattr(ahead_module, "MOST_ROWS", 4)
    given = {"cfg": 4.0, "steps": 4, "positive": conditioning(1), "negative": conditioning(2)}
    found = sample(load(), **given)
    assert computed[:2] == [4, 1]
    assert torch.equal(as_before(lambda: sample(load(), **given)), found)


def guided(conditioning, **values):
    return [[text, {**options, **values}] for text, options in conditioning]


def test_another_guidance_or_prompt_is_another_sampling(load, sample, conditioning, as_before):
    patcher = load()
    changed = (conditioning(1), guided(conditioning(1), guidance=1.5), conditioning(2))
    latents = [sample(patcher, positive=positive) for positive in changed]
    assert not torch.equal(latents[0], latents[1])
    assert not torch.equal(latents[0], latents[2])
    expected = as_before(lambda: [sample(patcher, positive=positive) for positive in changed])
    assert all(map(torch.equal, latents, expected))


@pytest.mark.parametrize("method", ["index", "uxo"])
def test_kontext_is_as_before(method, load, sample, conditioning, as_before, computed, copies):
    picture = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(3))
    positive = guided(conditioning(1), reference_latents=[picture], reference_latents_method=method)
    found = sample(load(), positive=positive, steps=3)
    assert computed == [3]
    assert not torch.equal(found, sample(load(), positive=conditioning(1), steps=3))
    assert torch.equal(as_before(lambda: sample(load(), positive=positive, steps=3)), found)


def test_fill_is_as_before(sample, conditioning, as_before, computed, tmp_path, monkeypatch, copies):
    make_checkpoint(tmp_path / "fill.safetensors", FILL)
    config = comfy.supported_models.FluxInpaint(tiny_config(2, 2) | {"in_channels": 96})
    monkeypatch.setattr(comfy.model_detection, "model_config_from_unet", lambda *_, **__: config)
    patcher = load_transformer(read_catalogue(tmp_path / "fill.safetensors")).clone()
    picture = {"concat_latent_image": torch.ones(1, 16, 8, 8), "concat_mask": torch.ones(1, 1, 64, 64)}
    positive = guided(conditioning(1), **picture)
    found = sample(patcher, positive=positive, steps=3)
    assert computed == [3]
    assert torch.equal(as_before(lambda: sample(patcher, positive=positive, steps=3)), found)


def test_nothing_of_a_sampling_is_kept_after_it(load, sample, copies):
    patcher = load(1, 1)
    modulation = patcher.model.streaming.modulation
    kept = []
    handle = patcher.model.diffusion_model.single_blocks[-1].register_forward_hook(
        lambda *_: kept.extend(
            weakref.ref(forward.vector) for run in modulation.ahead._runs for forward in run.forwards
        )
    )
    sample(patcher)
    handle.remove()
    assert len(kept) > 2
    assert not any(reference() is not None for reference in kept)


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize(
    "name", ["double_blocks.0.img_mod.lin", "double_blocks.5.txt_mod.lin", "single_blocks.4.linear1"]
)
def test_an_interrupt_in_the_midst_leaves_the_next_sampling_right(name, step, load, sample, copies):
    patcher, calls = load(1, 2), []
    expected = sample(patcher, steps=3)

    def interrupt(*_):
        calls.append(name)
        if len(calls) > step:
            raise KeyboardInterrupt

    handle = patcher.model.diffusion_model.get_submodule(name).register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        sample(patcher, steps=3)
    handle.remove()
    assert torch.equal(sample(patcher, steps=3), expected)


def test_memory_that_runs_out_while_it_is_computed_gives_residents_up(load, sample, copies, caplog):
    patcher, failures = load(DOUBLES, SINGLES), [torch.OutOfMemoryError("fake")]
    expected = sample(patcher, steps=3)

    def fail(*_):
        if failures:
            raise failures.pop()

    layer = patcher.model.diffusion_model.double_blocks[3].img_mod.lin
    handle = layer.register_forward_pre_hook(fail)
    assert torch.equal(sample(patcher, steps=3), expected)
    handle.remove()
    assert "resident blocks were given up" in caplog.text


def test_the_next_forward_computes_what_an_earlier_one_did_not_come_to(load, sample, copies):
    """A node may leave blocks out, in some steps only."""
    patcher, expected = load(1, 1), None
    for _ in range(2):
        left_out = patcher.clone()
        calls = []

        def leave_out(args, extra, calls=calls):
            calls.append(1)
            return {"img": args["img"]} if len(calls) < 2 else extra["original_block"](args)

        left_out.set_model_patch_replace(leave_out, "dit", "single_block", 3)
        latents = sample(left_out, steps=3)
        assert len(calls) == 3
        expected = latents if expected is None else expected
        assert torch.equal(latents, expected)


def test_gradients_go_through_the_layers(load):
    patcher = load()
    modulation = patcher.model.diffusion_model.double_blocks[0].img_mod
    vec = torch.randn(1, HIDDEN, requires_grad=True)
    modulation(vec)[0].scale.sum().backward()
    assert vec.grad.abs().sum() > 0


def test_compiled_blocks_are_compiled_once(load, sample, copies):
    torch.compiler.reset()
    patcher = load(1, 1)
    expected = sample(patcher, steps=3)
    keys = [
        f"diffusion_model.{kind}_blocks.{i}"
        for kind, of in (("double", DOUBLES), ("single", SINGLES))
        for i in range(of)
    ]
    compiled = patcher.clone()
    set_torch_compile_wrapper(model=compiled, backend="eager", keys=keys)
    assert torch.equal(sample(compiled, steps=3), expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(sample(compiled, steps=3), expected)
    torch.compiler.reset()
