"""The experiment on modulation: both of its models make the same picture."""

import json

import pytest
import torch
from modulation import TINY_SIZES, Remembered, run, table
from tiny_flux import HIDDEN
from torch import nn
from weights import TINY_BLOCKS


def test_a_remembered_layer_computes_once_and_shows_no_weights():
    linear = nn.Linear(4, 4)
    remembered, x = Remembered(linear), torch.randn(1, 4)
    first = remembered(x)
    with torch.no_grad():
        linear.weight.zero_()
    assert torch.equal(remembered(x), first)
    assert list(remembered.parameters()) == []


def test_another_case_is_remembered_anew():
    remembered = Remembered(nn.Linear(4, 4))
    first = remembered(torch.zeros(1, 4))
    remembered.forget()
    assert not torch.equal(remembered(torch.ones(1, 4)), first)


def test_both_models_make_the_same_picture_at_each_size(tiny_files, tmp_path):
    """It fails otherwise."""
    results = run(tiny_files, TINY_SIZES, 1, 2, tmp_path)
    assert json.loads((tmp_path / "modulation.json").read_text()) == results
    assert [row["pixels"] for row in results["rows"]] == [64, 96]
    assert all(row["streamed_ms"] > 0 and row["remembered_ms"] > 0 for row in results["rows"])
    doubles, singles = TINY_BLOCKS
    weights = (doubles * 12 + singles * 3) * HIDDEN**2
    assert results["modulation_bytes"] == pytest.approx(weights * 0.5625, rel=0.03)  # and biases
    assert len(table(results).splitlines()) == 4
