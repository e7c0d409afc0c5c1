"""The benchmark of modulation that is computed ahead: both of its models make the same picture."""

import json

import pytest
from modulation import TINY_ROWS, line_of, load_as_before, rows_of, run
from tiny_flux import HIDDEN
from weights import TINY_BLOCKS


def test_the_model_of_before_has_its_modulation_in_its_blocks(tiny_files):
    before = load_as_before(tiny_files.nf4()).model.streaming
    assert before.modulation is None
    doubles, singles = TINY_BLOCKS
    weights = (doubles * 12 + singles * 3) * HIDDEN**2 * 0.5625
    assert before.streamer.host_bytes > 2 * weights


def test_both_models_make_the_same_picture_in_each_row(tiny_files, tmp_path, capsys):
    """It fails otherwise."""
    results = run(tiny_files, TINY_ROWS, 1, tmp_path)
    assert json.loads((tmp_path / "modulation.json").read_text()) == results
    assert [row["name"] for row in results["rows"]] == [row.name for row in TINY_ROWS]
    assert all(row["ahead_s"] > 0 and ("before_s" in row) == (row["most_ratio"] > 0) for row in results["rows"])
    doubles, singles = TINY_BLOCKS
    weights = (doubles * 12 + singles * 3) * HIDDEN**2
    assert results["modulation_bytes"] == pytest.approx(weights * 0.5625, rel=0.03)  # and biases
    assert len(capsys.readouterr().out.splitlines()) >= len(TINY_ROWS)


@pytest.mark.parametrize(
    ("found", "most", "verdict"),
    [
        ((0.7, 4.9), (0.78, 5.0), "held"),
        ((0.8, 4.9), (0.78, 5.0), "missed"),
        ((0.7, 5.1), (0.78, 5.0), "missed"),
        ((None, 5.0), (0.0, 5.0), "held"),
        ((None, 5.1), (0.0, 5.0), "missed"),
        ((1.0, 9.0), (1.02, 0.0), "held"),
    ],
)
def test_a_line_says_whether_its_targets_are_kept(found, most, verdict):
    ratio, gib = found
    before = {} if ratio is None else {"before_s": 10.0, "before_gib": 7.0}
    row = {"name": "a", "most_ratio": most[0], "most_gib": most[1], "ahead_s": 10 * (ratio or 1.0), "ahead_gib": gib}
    assert line_of(row | before).split(" | ")[-1] == f"{verdict} |"


def test_every_target_of_the_benchmark_has_a_row_of_its_own():
    rows = rows_of(30)
    assert len({row.name for row in rows}) == len(rows)
    assert all(row.most_ratio or row.most_gib for row in rows)
    assert {row.setting for row in rows} == {row.setting for row in TINY_ROWS}
