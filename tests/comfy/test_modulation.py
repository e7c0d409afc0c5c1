"""The modulation is computed ahead: latents have the same bits as without that, and its weights pass once."""

import weakref

import comfy.ldm.flux.math
import comfy.model_detection
import comfy.supported_models
import pytest
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from computed_ahead import as_before
from make_checkpoint import Recipe, make_checkpoint
from tiny_flux import HIDDEN, detection_of
from tiny_flux import tiny_config as config_of

from flux_nf4.checkpoints import load_transformer, streamed
from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue
from flux_nf4.offload import ahead as ahead_module
from flux_nf4.offload.ahead import Ahead
from flux_nf4.offload.plan import Residency

DOUBLES, SINGLES = 2, 3
FILL = Recipe(double_blocks=2, single_blocks=2, hidden=HIDDEN, in_channels=384, unet_only=True)
SAMPLERS = ("euler", "heun", "dpmpp_2m", "dpmpp_sde", "dpm_2", "lcm", "uni_pc", "res_multistep", "er_sde")
CFG_AND_BATCH = ((1.0, 1), (4.0, 2), (4.0, 1), (1.0, 2))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    """As that of the other tests, with fewer blocks."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    make_checkpoint(path, Recipe(double_blocks=DOUBLES, single_blocks=SINGLES, hidden=HIDDEN, unet_only=True))
    return path


@pytest.fixture
def tiny_config(monkeypatch):
    """ComfyUI "detects" it."""
    monkeypatch.setattr(comfy.model_detection, "model_config_from_unet", detection_of(DOUBLES, SINGLES))


@pytest.fixture
def few_ahead(monkeypatch):
    """How many forwards are computed at once."""
    monkeypatch.setattr(ahead_module, "AHEAD", 3)
    return 3


@pytest.fixture
def no_room(monkeypatch):
    """A function: from now on the device has no more room than the model has taken."""

    def none(device=None, torch_free_too=False):
        return (0, 0) if torch_free_too else 0

    return lambda: monkeypatch.setattr(comfy.model_management, "get_free_memory", none)


def modulation_of(patcher):
    return patcher.model.streaming.modulation


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


@pytest.mark.parametrize(
    ("sampler", "cfg", "batch"),
    [
        *((sampler, *CFG_AND_BATCH[index % 4]) for index, sampler in enumerate(SAMPLERS)),
        *(("euler", *each) for each in CFG_AND_BATCH[1:]),
    ],
)
def test_latents_are_those_of_before(sampler, cfg, batch, load, sample, conditioning, copies):
    latent = torch.zeros(batch, 16, 8, 8)
    given = {"sampler": sampler, "cfg": cfg, "latent": latent, "steps": 3}
    conds = {"positive": conditioning(1), "negative": conditioning(2)}
    expected = as_before(lambda: sample(load(1, 1), **given, **conds))
    assert torch.equal(sample(load(), **given, **conds), expected)


@pytest.mark.parametrize("has_room", [False, True])
@pytest.mark.parametrize(("double", "single"), [(0, 0), (1, 2), (DOUBLES, SINGLES)])
def test_the_weights_pass_once_for_all_steps_that_are_computed_at_once(
    double, single, has_room, load, sample, copies, few_ahead, no_room
):
    patcher = load(double, single)
    if not has_room:
        no_room()
    sample(patcher, steps=1)
    plan, weights = patcher.model.streaming.streamer.plan, modulation_bytes(patcher)
    modulation = modulation_of(patcher).streamer
    if modulation.plan.streamed:
        layers = sorted(size.streamed for size in modulation.sizes(whole_blocks=True))
        assert modulation.plan.staging_bytes == (layers[-1] if not plan.streamed else 2 * layers[-1])
    all_stays = has_room and not plan.streamed
    for steps, passes in ((1, 1), (few_ahead, 1), (few_ahead + 1, 2)):
        copies.nbytes = 0
        sample(patcher, steps=steps)
        assert copies.nbytes == steps * plan.bytes_per_forward + (0 if all_stays else passes * weights)
    copies.nbytes = 0
    as_before(lambda: sample(patcher, steps=2))
    assert copies.nbytes == 2 * (plan.bytes_per_forward + (0 if all_stays else weights))


def test_weights_that_stay_need_no_look_ahead(load, sample, copies, monkeypatch):
    """No forward waits on the host, none computes what another will need, and no layer is called through hooks."""
    expected, patcher = sample(load()), load(DOUBLES, SINGLES)

    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(Ahead, "_run_of", refuse)
    for residency in (patcher.residency, Residency()):
        patcher.residency = residency
        assert torch.equal(sample(patcher), expected)
        assert modulation_of(patcher).stays
        assert not any(module._forward_pre_hooks for module in modulation_of(patcher).ahead.modules)


@pytest.mark.parametrize("short", [0, 1])
def test_a_budget_decides_with_the_numbers_of_the_blocks_plan(short, load, sample, copies):
    patcher, expected = load(DOUBLES, SINGLES), sample(load())
    streaming, modulation = patcher.model.streaming, modulation_of(patcher)
    everything = streaming.outside_bytes + patcher.plan.device_bytes
    everything += sum(size.nbytes for size in modulation.streamer.sizes())
    patcher.residency = Residency(budget_bytes=everything - short)
    assert torch.equal(sample(patcher), expected)
    assert streaming.streamer.plan.streamed == ()
    assert modulation.stays == (short == 0)
    held = sum(streamer.device_bytes for streamer in streaming.streamers) + streaming.outside_bytes
    assert patcher.loaded_size() == held
    assert held == everything if not short else held + modulation.kept_bytes < everything
    assert modulation.device_bytes == modulation.streamer.device_bytes


def test_the_room_that_comfyui_gives_decides_where_no_budget_is_set(load, sample, copies):
    patcher = load(DOUBLES, SINGLES)
    streaming = patcher.model.streaming
    needed = streaming.taken_bytes + patcher.plan.device_bytes
    for room, stays in ((needed, False), (needed + modulation_of(patcher).more_bytes, True), (needed, False)):
        patcher.load(CPU, room)
        assert streaming.streamer.plan.streamed == ()
        assert modulation_of(patcher).stays == stays
        assert patcher.loaded_size() + (0 if stays else modulation_of(patcher).kept_bytes) <= room


def test_no_other_model_must_leave_for_it(load, sample, copies):
    """ComfyUI makes as much room as `model_size` says."""
    patcher = load(DOUBLES, SINGLES)
    patcher.model.streaming.stop()
    needed = patcher.model_size()
    sample(patcher)
    assert patcher.model_size() == patcher.loaded_size() > needed
    comfy.model_management.unload_all_models()
    assert patcher.model_size() == needed
    assert modulation_of(patcher).streamer.device_bytes == 0


def test_it_is_what_comfyui_takes_back_first_and_it_returns(load, sample, copies):
    patcher = load(DOUBLES, SINGLES)
    expected = sample(patcher)
    streamer, modulation, full = patcher.model.streaming.streamer, modulation_of(patcher), patcher.loaded_size()
    weights, ring = modulation.device_bytes, sum(sorted(copied_layers(modulation))[-2:])
    copies.nbytes = 0
    freed = patcher.partially_unload(CPU, 1)
    assert copies.nbytes <= ring + modulation.streamer.plan.small_bytes
    assert freed == full - patcher.loaded_size() == weights - modulation.device_bytes > 0
    assert (modulation.stays, streamer.plan.streamed) == (False, ())
    assert patcher.partially_unload(CPU, 1) > 0
    assert 0 < len(streamer.plan.resident) < DOUBLES + SINGLES
    assert torch.equal(sample(patcher), expected)
    assert (modulation.stays, streamer.plan.streamed) == (True, ())
    assert patcher.partially_unload(CPU, freed + 1) > freed
    assert (modulation.stays, bool(streamer.plan.streamed)) == (False, True)
    assert torch.equal(sample(patcher), expected)
    assert patcher.partially_unload(CPU, 10 * full) == 0
    assert modulation.stays, "all together were not enough"


def copied_layers(modulation):
    return [size.streamed for size in modulation.streamer.sizes(whole_blocks=True)]


def test_a_device_without_room_for_it_after_all_keeps_all_blocks(load, sample, copies, monkeypatch, caplog):
    patcher = load(DOUBLES, SINGLES)
    modulation, empty = modulation_of(patcher), copies.empty
    sizes = copied_layers(modulation)

    def fail(nbytes):
        if min(sizes) <= nbytes <= 1.1 * max(sizes):
            raise torch.OutOfMemoryError("fake")
        return empty(nbytes)

    expected = sample(load())
    patcher.model.streaming.start(patcher.plan, CPU, whole_blocks=False, wanted=None, modulation_stays=False)
    monkeypatch.setattr(copies, "empty", fail)
    assert torch.equal(sample(patcher), expected)
    assert (modulation.stays, modulation.ahead.weights_stay) == (False, False)
    assert patcher.model.streaming.streamer.plan.streamed == ()
    layers = len(sizes)
    assert f"the device has room for 0 of {layers} layers of the modulation; the others are streamed" in caplog.text
    assert "resident blocks" not in caplog.text


@pytest.mark.parametrize("short", [0, 1])
def test_where_the_device_is_short_the_ring_comes_before_the_blocks_and_they_before_the_weights(
    short, load, sample, copies, monkeypatch
):
    """It has room for all blocks and the modulation's ring, which then is of one layer, or for a byte less."""
    patcher, expected = load(DOUBLES, SINGLES), sample(load())
    streaming, modulation = patcher.model.streaming, modulation_of(patcher)
    streaming.stop()
    sizes = modulation.streamer.sizes(whole_blocks=True)
    passing = max(size.streamed for size in sizes) + sum(size.small for size in sizes)
    room, empty, held = patcher.plan.device_bytes + passing - short, copies.empty, []

    def within_room(nbytes):
        if nbytes + sum(memory().nbytes for memory in held if memory() is not None) > room:
            raise torch.OutOfMemoryError("fake")
        memory = empty(nbytes)
        held.append(weakref.ref(memory))
        return memory

    monkeypatch.setattr(copies, "empty", within_room)
    assert torch.equal(sample(patcher), expected)
    assert bool(streaming.streamer.plan.streamed) == bool(short)
    assert streaming.streamer.plan.resident
    assert modulation.streamer.plan.resident == ()


def test_two_clones_in_turn_have_it_where_each_wants_it(load, sample, copies):
    first = load(DOUBLES, SINGLES)
    second = first.clone()
    second.residency = Residency((("double", 1), ("single", 0)))
    expected = sample(first)
    for patcher in (second, first, second, first):
        assert torch.equal(sample(patcher), expected)
        assert modulation_of(first).stays == (patcher is first)


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
    load, sample, conditioning, computed, monkeypatch
):
    monkeypatch.setattr("comfy.samplers.can_concat_cond", lambda one, other: one is other)
    given = {"cfg": 4.0, "steps": 4, "positive": conditioning(1), "negative": conditioning(2)}
    found = sample(load(), **given)
    assert computed == [4, 4]
    assert torch.equal(as_before(lambda: sample(load(), **given)), found)


def test_more_prompts_than_there_is_room_for_are_computed_when_they_come(
    load, sample, conditioning, computed, monkeypatch
):
    monkeypatch.setattr("comfy.samplers.can_concat_cond", lambda one, other: one is other)
    monkeypatch.setattr(ahead_module, "MOST_ROWS", 4)
    given = {"cfg": 4.0, "steps": 4, "positive": conditioning(1), "negative": conditioning(2)}
    found = sample(load(), **given)
    assert computed[:2] == [4, 1]
    assert torch.equal(as_before(lambda: sample(load(), **given)), found)


def guided(conditioning, **values):
    return [[text, {**options, **values}] for text, options in conditioning]


def test_another_guidance_or_prompt_is_another_sampling(load, sample, conditioning):
    patcher = load()
    changed = (conditioning(1), guided(conditioning(1), guidance=1.5), conditioning(2))
    latents = [sample(patcher, positive=positive) for positive in changed]
    assert not torch.equal(latents[0], latents[1])
    assert not torch.equal(latents[0], latents[2])
    expected = as_before(lambda: [sample(patcher, positive=positive) for positive in changed])
    assert all(map(torch.equal, latents, expected))


@pytest.mark.parametrize("method", ["index", "uxo"])
def test_kontext_is_as_before(method, load, sample, conditioning, computed, copies):
    picture = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(3))
    positive = guided(conditioning(1), reference_latents=[picture], reference_latents_method=method)
    found = sample(load(), positive=positive, steps=3)
    assert computed == [3]
    assert not torch.equal(found, sample(load(), positive=conditioning(1), steps=3))
    assert torch.equal(as_before(lambda: sample(load(), positive=positive, steps=3)), found)


def test_fill_is_as_before(sample, conditioning, computed, tmp_path, monkeypatch, copies):
    make_checkpoint(tmp_path / "fill.safetensors", FILL)
    config = comfy.supported_models.FluxInpaint(config_of(2, 2) | {"in_channels": 96})
    monkeypatch.setattr(comfy.model_detection, "model_config_from_unet", lambda *_, **__: config)
    model = load_transformer(read_catalogue(tmp_path / "fill.safetensors"))
    patcher = streamed(model, Residency((("double", 0), ("single", 0))), node_id=None)
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
    "name", ["double_blocks.0.img_mod.lin", "double_blocks.1.txt_mod.lin", "single_blocks.2.linear1"]
)
def test_an_interrupt_in_the_midst_leaves_the_next_sampling_right(name, step, load, sample, copies):
    patcher, calls = load(1, 1), []
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


@pytest.mark.parametrize("count", [1, 2])
def test_memory_that_runs_out_takes_its_weights_first_and_then_the_resident_blocks(count, load, sample, copies, caplog):
    patcher, failures = load(DOUBLES, SINGLES), [torch.OutOfMemoryError("fake") for _ in range(count)]
    patcher.model.streaming.said.clear()  # the model may be one that a test before has loaded
    expected = sample(patcher, steps=3)

    def fail(*_):
        if failures:
            raise failures.pop()

    layer = patcher.model.diffusion_model.double_blocks[1].img_mod.lin
    handle = layer.register_forward_pre_hook(fail)
    assert torch.equal(sample(patcher, steps=3), expected)
    handle.remove()
    assert "the modulation's weights were given up" in caplog.text
    assert ("the 5 resident blocks were given up" in caplog.text) == (count == 2)
    assert bool(patcher.model.streaming.streamer.plan.resident) == (count == 1)
    assert patcher.loaded_size() == patcher.model.streaming.held_bytes(from_host=False)


def test_the_next_forward_computes_what_an_earlier_one_did_not_come_to(load, sample, copies):
    """A node may leave blocks out, in some steps only."""
    patcher, expected = load(1, 1), None
    for _ in range(2):
        left_out = patcher.clone()
        calls = []

        def leave_out(args, extra, calls=calls):
            calls.append(1)
            return {"img": args["img"]} if len(calls) < 2 else extra["original_block"](args)

        left_out.set_model_patch_replace(leave_out, "dit", "single_block", 1)
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


def test_compiled_blocks_are_compiled_once(load, sample, copies, monkeypatch):
    """And what is computed ahead is no part of the compiled code."""
    # ComfyUI's default attention of a CPU asks for free RAM, and compiled code is made anew when the answer is another.
    monkeypatch.setattr(comfy.ldm.flux.math, "optimized_attention", attention_pytorch)
    torch.compiler.reset()
    patcher = load(1, 1)
    expected = sample(patcher, steps=3)
    output, traced = Ahead.output, []

    def note(*given):
        traced.append(torch.compiler.is_compiling())
        return output(*given)

    monkeypatch.setattr(Ahead, "output", note)
    keys = [f"diffusion_model.double_blocks.{index}" for index in range(DOUBLES)]
    compiled = patcher.clone()
    set_torch_compile_wrapper(model=compiled, backend="eager", keys=keys)
    assert torch.equal(sample(compiled, steps=3), expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(sample(compiled, steps=3), expected)
    assert traced
    assert not any(traced)
    torch.compiler.reset()
