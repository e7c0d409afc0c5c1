"""int8 in a streamed model: one picture wherever the blocks are, whoever else uses the model, whatever stops it."""

import logging

import comfy.hooks
import comfy.model_management
import loras
import pytest
import torch
from int8_on_cpu import int8_on_cpu
from tiny_blocks import DOUBLES, SINGLES

from flux_nf4 import nodes_compute
from flux_nf4.nf4_loader.linear import kitchen, measured
from flux_nf4.nodes_compute import EXACT, choose

FASTER = "int8 where faster"


@pytest.fixture(autouse=True)
def int8(request):
    """Every Linear with as many rows as the tiny picture has tokens counts as one with many. False: without Triton."""
    by_kernel = getattr(request, "param", True)
    # Not by the fixture monkeypatch: a test that replaces the same names by it must be undone before this is.
    with int8_on_cpu(by_kernel=by_kernel), pytest.MonkeyPatch.context() as patch:
        patch.setattr("flux_nf4.nf4_loader.linear.int8._LEAST_ROWS", 4)
        patch.setattr(nodes_compute, "_said", {})
        yield


@pytest.fixture
def sample(sample):
    """One step is enough."""
    return lambda patcher: sample(patcher, steps=1)


@pytest.fixture
def load_int8(load):
    return lambda *counts: choose(load(*counts), FASTER)


@pytest.fixture
def expected(load_int8, sample, copies):
    """Latents of the model with every block resident."""
    return sample(load_int8(DOUBLES, SINGLES))


@pytest.fixture
def exact(load, sample, copies):
    return sample(load(0, 0))


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def test_it_is_another_picture_and_nearly_the_same(expected, exact):
    assert 1e-4 < relative(expected, exact) < 0.05


@pytest.mark.parametrize("int8", [True, False], ids=["by kernel", "without Triton"], indirect=True)
@pytest.mark.parametrize("counts", [(0, 0), (3, 4)])
def test_streamed_is_equal_to_resident(counts, load_int8, sample, expected):
    patcher = load_int8(*counts)
    assert torch.equal(sample(patcher), expected)
    assert patcher.model.streaming.streamer.plan.streamed
    assert torch.equal(sample(patcher), expected)


def test_unloaded_in_part_and_whole_it_is_equal(load_int8, sample, expected):
    patcher = load_int8(2, 3)
    sample(patcher)
    assert patcher.model.streaming.streamer.plan.streamed
    patcher.partially_unload(torch.device("cpu"), 1)
    assert torch.equal(sample(patcher), expected)
    comfy.model_management.unload_all_models()
    assert all(layer.int8 is None for layer in patcher.model.streaming.patching._choosing)
    assert torch.equal(sample(patcher), expected)


def test_clones_of_both_kinds_can_be_sampled_in_turn(load, sample, expected, exact):
    plain = load(1, 1)
    fast = choose(plain.clone(), FASTER)
    for _ in range(2):
        assert torch.equal(sample(plain), exact)
        assert torch.equal(sample(fast), expected)
    assert fast.clone().compute == FASTER


class Interrupt(BaseException):
    """As ComfyUI's own: raised from inside any layer."""


def test_an_interrupted_run_leaves_the_next_one_equal(load_int8, sample, expected):
    patcher = load_int8(1, 2)

    def interrupt(*_):
        raise Interrupt

    handle = patcher.model.diffusion_model.single_blocks[3].linear2.register_forward_pre_hook(interrupt)
    with pytest.raises(Interrupt):
        sample(patcher)
    handle.remove()
    assert torch.equal(sample(patcher), expected)


def test_layers_outside_blocks_and_the_modulation_are_exact(load_int8, sample, copies):
    patcher = load_int8(0, 0)
    sample(patcher)
    transformer = patcher.model.diffusion_model
    assert transformer.txt_in.int8 is None
    assert transformer.final_layer.linear.int8 is None
    rows = {case.rows for case in measured.timings}
    assert rows == {8, 16, 24}  # tokens of text, of the picture, of both; the modulation has one


def test_what_it_keeps_is_counted(load_int8, sample, copies):
    patcher = load_int8(2, 3)
    sample(patcher)
    streaming = patcher.model.streaming
    layers = [layer for layer in streaming.patching._choosing if layer.int8 is not None]
    kept = sum(4 * layer.out_features for layer in layers)
    assert kept
    assert streaming.patching.device_bytes == kept
    assert patcher.model_size() == streaming.other_bytes + kept + streaming.streamer.device_bytes
    comfy.model_management.unload_all_models()
    assert streaming.patching.device_bytes == 0


def test_the_choice_is_measured_once_for_all(load_int8, sample, expected, monkeypatch):
    def again(case):
        raise AssertionError(f"measured again: {case}")

    monkeypatch.setattr(measured, "measure", again)
    assert torch.equal(sample(load_int8(2, 2)), expected)


def test_where_it_is_slower_it_is_the_exact_picture(load_int8, sample, exact, copies):
    with int8_on_cpu(is_faster=False):
        assert torch.equal(sample(load_int8(1, 1)), exact)


# With LoRA


@pytest.fixture
def with_lora(load):
    """A function: a patcher with a LoRA on every Linear of its blocks."""
    shapes = loras.linear_shapes(load().model)
    file = loras.kohya(shapes)

    def give(patcher, strength):
        return comfy.sd.load_lora_for_models(patcher, None, file, strength, 0)[0]

    return give


def test_with_lora_streamed_is_equal_to_resident_at_each_strength(load_int8, sample, expected, with_lora, copies):
    seen = []
    for strength in (0.8, 0.3):
        streamed, resident = load_int8(0, 0), load_int8(DOUBLES, SINGLES)
        seen.append(sample(with_lora(streamed, strength)))
        assert torch.equal(sample(with_lora(resident, strength)), seen[-1])
    assert len({float(found.norm()) for found in (*seen, expected)}) == 3
    assert torch.equal(sample(load_int8(0, 0)), expected)


def test_with_lora_it_is_near_the_exact_picture_with_lora(load, load_int8, sample, exact, with_lora, copies):
    found, wanted = sample(with_lora(load_int8(0, 0), 0.8)), sample(with_lora(load(0, 0), 0.8))
    assert relative(wanted, exact) > 2 * relative(found, wanted)
    assert 1e-4 < relative(found, wanted) < 0.05


# What is said


def said(caplog):
    return [record.getMessage() for record in caplog.records if "int8" in record.getMessage()]


@pytest.fixture
def gpu(monkeypatch):
    """The CPU counts as a GPU that int8 can be measured on."""
    monkeypatch.setattr(kitchen, "problem_on", lambda device, dtype: None)


def test_it_is_said_once_what_was_chosen(load_int8, sample, copies, caplog):
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            sample(load_int8(0, 0))
    (line,) = said(caplog)
    count = len(measured.timings)
    assert line == (
        f"NF4: {count} of {count} measured kinds of layers compute in int8 on cpu; together all of them are 2.00 times "
        "as fast"
    )


def test_it_is_said_once_that_nothing_was_chosen(load_int8, sample, copies, caplog):
    with int8_on_cpu(is_faster=False), caplog.at_level(logging.INFO):
        for _ in range(2):
            sample(load_int8(0, 0))
    assert said(caplog) == ["NF4: int8 is faster for none of the layers on cpu, so all of them compute exactly"]


@pytest.mark.usefixtures("gpu")
def test_an_exact_model_is_told_once_what_int8_would_bring(load, sample, exact, copies, caplog):
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert torch.equal(sample(choose(load(0, 0), EXACT)), exact)
    (line,) = said(caplog)
    assert line.startswith("NF4: int8 was measured to be 2.0 times as fast for the largest layers on cpu.")
    (case,) = measured.timings
    assert case.rows == 4608


@pytest.mark.usefixtures("gpu")
def test_an_exact_model_is_told_nothing_where_int8_gains_nothing(load, sample, copies, caplog):
    with int8_on_cpu(is_faster=False), caplog.at_level(logging.INFO):
        sample(choose(load(0, 0), EXACT))
    assert not said(caplog)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("boom")])
def test_advice_that_fails_loses_no_picture(load, sample, exact, copies, monkeypatch, error):
    def fails(case):
        raise type(error)(*error.args)  # a new one: the parameter lives on, and its traceback would keep the model

    monkeypatch.setattr(measured, "measure", fails)
    assert torch.equal(sample(choose(load(0, 0), EXACT)), exact)


@pytest.mark.usefixtures("gpu")
def test_a_node_without_the_choice_measures_nothing(load, sample, copies, caplog):
    with caplog.at_level(logging.INFO):
        sample(choose(load(0, 0), None))
    assert not measured.timings
    assert not said(caplog)


def test_clones_say_it_once(load_int8, copies, monkeypatch):
    calls = []
    monkeypatch.setattr(nodes_compute, "_say", calls.append)
    patcher = choose(load_int8(0, 0).clone(), FASTER).clone()
    patcher.cleanup()
    assert len(calls) == 1
