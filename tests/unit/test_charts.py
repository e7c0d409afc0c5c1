"""Charts, tables and the measured figures say the same."""

import re

import charts
import pytest
import torch
from sparse_checkpoint import make_sparse_checkpoint

from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue
from flux_nf4.offload.plan import Residency
from flux_nf4.page.file_plan import block_sizes, make_plan

DATA = charts.read_data()
MEASURED = {name: data for name, data in DATA.items() if not data.get("is_computed")}


def test_charts_and_tables_are_those_of_the_figures():
    made = [*charts.charts(), *charts.texts()]
    assert {path.name for path, _ in made} > {"README.md", "README.zh.md", "measurements.md", "your_card.svg"}
    assert [path.name for path, content in made if path.read_text("utf-8") != content] == [], (
        "run: python3 tools/charts.py"
    )
    assert set(charts.CHARTS.iterdir()) == {path for path, _ in made if path.suffix == ".svg"}


@pytest.mark.parametrize("name", MEASURED)
def test_every_value_stands_in_the_table_under_its_head(name):
    """Read as a person reads it, and not with the code that has written it."""
    text = (charts.ROOT / "docs" / "measurements.md").read_text("utf-8")
    table = text.split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0]
    heads, _, *rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in table.splitlines()]
    for column, series in enumerate(MEASURED[name]["series"], 1):
        assert heads[column].startswith(series["name"]["en"])
        assert [row[column] for row in rows] == ["–" if v is None else str(v) for v in series["values"]]
    assert [row[0] for row in rows] == MEASURED[name]["groups"]


@pytest.mark.parametrize("name", MEASURED)
def test_bars_are_as_long_as_their_values(name):
    drawn = (charts.CHARTS / f"{name}.svg").read_text("utf-8")
    bars = re.findall(r'<rect x="\d+" y="\d+" width="([\d.]+)".*?\n<text .*?>([\d.]+)</text>', drawn)
    values = [v for series in MEASURED[name]["series"] if not series.get("is_text") for v in series["values"]]
    assert sorted(float(value) for _, value in bars) == sorted(value for value in values if value is not None)
    most = max(float(value) for _, value in bars)
    for length, value in bars:
        assert float(length) == pytest.approx(float(value) / most * 240, abs=0.06)


@pytest.mark.parametrize("name", MEASURED)
def test_every_figure_has_its_card_its_comfyui_and_its_command(name):
    runs = MEASURED[name]["runs"]
    assert {series["run"] for series in MEASURED[name]["series"]} == set(runs)
    for run in runs.values():
        assert run["card"].startswith("NVIDIA")
        assert re.match(r"\d+\.\d+\.\d+", run["comfyui"])
        assert (charts.ROOT / run["command"]).is_file()
        assert run["what"]


def test_seconds_by_slot_are_computed_from_what_a_step_copies(tmp_path):
    path = tmp_path / "flux1-dev-bnb-nf4-v2.safetensors"
    make_sparse_checkpoint(path)
    blocks = block_sizes(read_catalogue(path), torch.bfloat16)
    slots = DATA["slots"]
    assert slots["is_computed"]
    for counts, gb in slots["gb_a_step"].items():
        double, single = map(int, counts.split(" / "))
        plan = make_plan(blocks, 0, Residency((("double", double), ("single", single))))
        assert f"{plan.bytes_per_forward / 1e9:.2f}" == f"{gb:.2f}"
    text = (charts.ROOT / "README.md").read_text("utf-8")
    assert "| PCIe 3.0 x16 | 12.6 | 0.38 s |" in text  # 4.84 / (16 * 0.985 * 0.8)
    for name in ("README.md", "docs/measurements.md"):
        before_the_table = (charts.ROOT / name).read_text("utf-8").split("<!-- slots -->")[0].rsplit("\n## ", 1)[1]
        assert "omputed" in before_the_table
