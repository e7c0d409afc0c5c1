"""`benchmarks/int8_model.py`: both ways are run in turns, and compared step by step."""

import int8_model
import pytest
from cases import Case
from int8_model import BLOCKS, Row, measure, table
from int8_on_cpu import int8_on_cpu
from streamed import load


def test_both_ways_are_run_in_turns(tiny_files, monkeypatch):
    """On a CPU, with stand-ins for the kernels; a step in int8 is said to take a tenth longer."""
    ways = []

    def seconds(call, device):
        call()
        is_int8 = any(layer.int8 is not None for layer in layers)
        ways.append(is_int8)
        return 1.1 if is_int8 else 1.0

    patcher = load(tiny_files.nf4())
    layers = [module for module in patcher.model.diffusion_model.modules() if hasattr(type(module), "compute_by")]
    monkeypatch.setattr(int8_model, "seconds", seconds)
    monkeypatch.setattr(int8_model, "BLOCKS", {"all": (2, 3)})
    with int8_on_cpu():
        row = measure(patcher, 64, "all", 4, Case("", 64, text_tokens=8))
    assert ways == [True, False, True, False, *[False, True], *[True, False], *[False, True], *[True, False]]
    assert (row.exact_ms, row.int8_ms) == pytest.approx((1000, 1100))
    assert row.ratios == pytest.approx((1.1, 1.1, 1.1))


def test_a_line_says_how_far_the_pairs_differ():
    *_, line = table([Row(512, "none", 0, 70.0, 70.7, (0.99, 1.01, 1.03))]).splitlines()
    assert line == "| 512 | none | 0 | 70.0 | 70.7 | 1.010 | 0.990 to 1.030 |"


def test_all_blocks_are_those_of_flux():
    assert BLOCKS == {"all": (19, 38), "none": (0, 0)}
