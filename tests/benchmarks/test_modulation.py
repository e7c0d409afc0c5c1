"""The benchmark of modulation that is computed ahead: both of its models make the same picture."""

import json

import pytest
from modulation import SETTINGS, TINY_CASES, load_as_before, run, table
from tiny_flux import HIDDEN
from weights import TINY_BLOCKS


def test_the_model_of_before_has_its_modulation_in_its_blocks(tiny_files):
    before = load_as_before(tiny_files.nf4()).model.streaming
    assert before.modulation is None
    doubles, singles = TINY_BLOCKS
    weights = (doubles * 12 + singles * 3) * HIDDEN**2 * 0.5625
    assert before.streamer.host_bytes > 2 * weights


def test_both_models_make_the_same_picture_in_each_case(tiny_files, tmp_path):
    """It fails otherwise."""
    results = run(tiny_files, TINY_CASES[:2], 1, 2, tmp_path)
    assert json.loads((tmp_path / "modulation.json").read_text()) == results
    assert [row["steps"] for row in results["rows"]] == [1, 3, 1] * len(SETTINGS)
    assert all(row["before_s"] > 0 and row["ahead_s"] > 0 for row in results["rows"])
    doubles, singles = TINY_BLOCKS
    weights = (doubles * 12 + singles * 3) * HIDDEN**2
    assert results["modulation_bytes"] == pytest.approx(weights * 0.5625, rel=0.03)  # and biases
    assert len(table(results).splitlines()) == 2 + len(results["rows"])
