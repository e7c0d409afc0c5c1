"""Parts of the comparison that a dry run does not reach, or not with figures."""

import time
from argparse import ArgumentTypeError
from types import SimpleNamespace

import diffusers
import gguf
import pytest
import torch
import turn
from arguments import pattern, positive
from bitsandbytes.nn import Linear4bit
from bus import PaddedCopies
from cases import CASES, Case, matching
from contenders import CONTENDERS
from diffusers_model import DiffusersModel, quantise_blocks
from memory import Use
from results import Row, table
from timing import least_disturbed
from turn import Difference, Effort, Figures
from weights import quantise_q4_0
from worker import Failure, Request, Worker

HOST = torch.device("cpu")


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "x", "", "²"])
def test_a_number_of_things_is_whole_and_positive(text):
    assert positive("12") == 12
    with pytest.raises(ArgumentTypeError, match="is not a whole number from 1 on"):
        positive(text)


def test_a_regular_expression_that_is_none_is_refused():
    assert pattern("a|b").search("b")
    with pytest.raises(ArgumentTypeError, match="is no regular expression: missing"):
        pattern("(")


def test_a_turn_that_something_disturbed_does_not_count():
    assert least_disturbed([[9.0, 9.0, 30.0], [3.0, 1.0, 2.0], [8.0]]) == 2.0


def test_a_row_has_the_times_of_the_turn_that_was_disturbed_least():
    row = Row(Case("x"), CONTENDERS[0])
    assert (row.ms, row.sampling_s) == (None, None)
    for ms, sampling_s in (([9.0, 7.0, 8.0], []), ([3.0, 20.0, 4.0], [2.0, 1.0, 5.0]), ([6.0], [3.0])):
        row.add(Figures(ms, sampling_s))
    assert (row.ms, row.sampling_s) == (4.0, 2.0)


def test_timed_calls_are_those_of_a_sampling_and_the_output_is_of_one_call():
    calls = []
    model = SimpleNamespace(
        device=HOST, step=lambda: calls.append("step"), forward=lambda: calls.append("forward") or torch.ones(1)
    )
    figures = Figures()
    output = turn._measure_calls(model, Effort(calls=4, seconds=60.0), figures, Use(0, 0))
    assert calls == [*["step"] * 6, "forward"], "two tell how long one takes"
    assert len(figures.ms) == 4
    assert output == 1


def test_q4_0_is_what_the_gguf_package_makes():
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    weight[2, 32:64] = 0
    expected = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q4_0)
    assert (quantise_q4_0(weight).numpy() == expected).all()


def test_blocks_of_diffusers_become_nf4_and_compute_about_the_same():
    sizes = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 128}
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(**sizes, guidance_embeds=True).to(torch.bfloat16)
    model = DiffusersModel(transformer, HOST, Case("x", 64, text_tokens=8), lambda: None)
    with torch.inference_mode():
        before = model.forward().float()
        quantise_blocks(transformer, HOST)
        after = model.forward().float()
    kinds = {name: type(module) for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {kind for name, kind in kinds.items() if "blocks." in name} == {Linear4bit}
    assert {kind for name, kind in kinds.items() if "blocks." not in name} == {torch.nn.Linear}
    states = [module.weight.quant_state for module in transformer.modules() if isinstance(module, Linear4bit)]
    assert {(state.quant_type, state.nested, state.absmax.dtype) for state in states} == {("nf4", False, torch.float32)}
    assert 0 < (after - before).norm() / before.norm() < 0.2


def test_padding_is_in_proportion_to_what_was_copied():
    source, target = torch.arange(1000.0), torch.zeros(1000)
    with PaddedCopies(HOST, share=3.5) as bus:
        target.copy_(source)
        target.to(torch.float64)
        target + target
    assert bus.padded_bytes == 2 * 3.5 * source.nbytes
    assert torch.equal(target, source)


def test_padding_leaves_single_numbers_alone():
    with PaddedCopies(HOST, share=9.0) as bus:
        torch.zeros(1).copy_(torch.ones(1))
    assert bus.padded_bytes == 0


def test_names_are_unique():
    for things in (CASES, CONTENDERS):
        names = [thing.name for thing in things]
        assert len(set(names)) == len(names)


def test_patterns_choose_in_the_order_of_the_names():
    names = ["1024", "512", "1024-cap4", "512-cap4"]
    assert matching(names, []) == names
    assert matching(names, ["512", "*-cap4"]) == ["512", "1024-cap4", "512-cap4"]
    with pytest.raises(ValueError, match="cap5"):
        matching(names, ["*-cap5"])


def test_the_table_gives_ratios_to_both_resident_models_and_names_failures():
    rows = [Row(Case("x"), contender) for contender in CONTENDERS]
    by_name = {row.contender.name: row for row in rows}
    by_name["bnb-nf4"].add(Figures(ms=[100.0, 300.0, 200.0]))
    by_name["comfy-bf16"].add(Figures(ms=[100.0]))
    unequal = Difference("bnb-nf4", is_equal=False, relative_error=0.25)
    for difference in (Difference("bnb-nf4", is_equal=True, relative_error=0.0), unequal):
        by_name["streamed-0-0"].add(Figures(ms=[210.0], peak_device=2**30, difference=difference))
    by_name["comfy-fp8"].add(Failure("out of memory", is_lasting=False))
    lines = {line.split("|")[1].strip(): line for line in table(rows)}
    assert "| 210.0 | 1.050 | 2.100 |  | 1.00 |" in lines["streamed-0-0"]
    assert "2.5e-01 from bnb-nf4" in lines["streamed-0-0"]
    assert "out of memory" in lines["comfy-fp8"]
    assert "not reached" in lines["gguf-q4"]


def test_a_worker_that_does_not_start_in_time_is_ended(tmp_path):
    worker = Worker("streamed", None, tmp_path / "log")
    began = time.monotonic()
    answer = worker.ask(Request("0/0", "streamed-0-0", Case("x"), None, tmp_path), timeout_s=0.2)
    assert answer == Failure("not done after 0 s", is_lasting=True)
    assert time.monotonic() - began < 20
    assert worker.stop() is None


def test_a_worker_that_dies_is_reported_and_may_start_again(tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH")  # without which it ends at once
    worker = Worker("streamed", None, tmp_path / "log")
    for _ in range(2):
        answer = worker.ask(Request("0/0", "streamed-0-0", Case("x"), None, tmp_path), timeout_s=60)
        assert answer == Failure("its process ended (exit code 1); see its log", is_lasting=True)
        assert "COMFYUI_PATH" in (tmp_path / "log").read_text()
