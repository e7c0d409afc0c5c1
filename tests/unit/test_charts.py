"""Charts, tables and the measured figures say the same."""

import json
import re
import sys

import charts
import proof_data
import pytest
import torch
from sparse_checkpoint import make_sparse_checkpoint

from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue
from flux_nf4.offload.plan import Residency
from flux_nf4.page.file_plan import block_sizes, make_plan

DATA = charts.read_data()
MEASURED = {name: data for name, data in DATA.items() if "series" in data}


def test_charts_and_tables_are_those_of_the_figures():
    made = [*charts.charts(), *charts.texts()]
    assert {path.name for path, _ in made} > {"README.md", "README.zh.md", "measurements.md", "your_card.svg"}
    assert [path.name for path, content in made if path.read_text("utf-8") != content] == [], (
        "run: python3 tools/charts.py"
    )
    assert set(charts.CHARTS.iterdir()) == {path for path, _ in made if path.suffix == ".svg"}


def cells_of(text):
    """Of its tables, without the lines below the heads."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("name", MEASURED)
def test_every_value_stands_in_the_table_under_its_head(name):
    """Read as a person reads it, and not with the code that has written it."""
    text = (charts.ROOT / "docs" / "measurements.md").read_text("utf-8")
    table = text.split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0]
    heads, *rows = cells_of(table)
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


ABOUT = {"device": "NVIDIA H200, 143771 MiB, 570.1", "comfyui": "0.33.0", "command": "proof.py --folder /mine"}


def figure(name, value, unit="", *, most=None, verdict="beside"):
    told = {"name": name, "value": value, "unit": unit, "most": most, "note": "", "verdict": verdict}
    return told | {"shown": f"{value} {unit}".strip(), "target": "" if most is None else f"at most {most}"}


def a_proof(**others):
    """Of all cards, two without GGUF and two alike, and one claim that is missed; what `benchmarks/proof.py` writes."""
    small = [figure("blocks that stay", "none"), figure("peak VRAM", 0.784, "GiB"), figure("gguf-q4", None, "ms")]
    large = [
        figure("blocks that stay", "all, 19 + 38"),
        figure("peak VRAM", 5.061, "GiB"),
        figure("gguf-q4", 569.2, "ms"),
    ]
    small += [figure("streamed-auto", 190.4, "ms"), figure("comfy-int8", 266.6, "ms")]
    large += [figure("streamed-auto", 180.0, "ms"), figure("comfy-int8", 250.0, "ms")]
    large.append(figure("NF4 here of the fastest by ComfyUI", 1.041, most=1.0, verdict="missed"))
    rows = {"card-4": small, "card-6": small, "card-8": large, "card-12": large, **others}
    how = {
        "about": ABOUT,
        "command": "compare.py --cases x",
        "script": "compare.py",
        "code": 0,
        "seconds": 9,
        "said": "",
    }
    return {"rows": {name: {"what": name, **how, "figures": figures} for name, figures in rows.items()}}


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """A function that takes a proof over into a copy of the texts, as the command does; their folder."""
    for name, folder in (("ROOT", tmp_path), ("DATA", tmp_path / "docs/data"), ("CHARTS", tmp_path / "docs/charts")):
        folder.mkdir(exist_ok=True, parents=True)
        monkeypatch.setattr(charts, name, folder)
    marks = "# Title\n\n<!-- {0} -->\nold\n<!-- /{0} -->\n\nThe end.\n"
    (tmp_path / "README.md").write_text(marks.format("your_card"))
    (tmp_path / "README.zh.md").write_text(marks.format("your_card"))
    (tmp_path / "docs" / "measurements.md").write_text(marks.format("proof"))

    def take_over(proof):
        (tmp_path / "proof.json").write_text(json.dumps(proof))
        monkeypatch.setattr(sys, "argv", ["charts.py", "--proof", str(tmp_path / "proof.json")])
        charts.main()
        return tmp_path

    return take_over


def test_a_proof_becomes_the_table_and_the_chart_of_cards(texts):
    folder = texts(a_proof(**{"new-prompt": [figure("RAM in total", 12.34, "GiB")]}))
    readme = (folder / "README.md").read_text()
    heads, *rows = cells_of(readme)
    assert [head.split(", ")[0] for head in heads[:4]] == [
        "your card",
        "blocks that stay in VRAM",
        "peak VRAM",
        "this package",
    ]
    assert heads[4:] == [
        "ComfyUI, int8, ms",
        "ComfyUI-GGUF, Q4_0, ms",
        "RAM in total, GiB",
    ]  # the others have no figure
    assert rows == [
        ["4 GB", "none", "0.78", "190", "267", "–", "12.3"],
        ["6 GB", "none", "0.78", "190", "267", "–", "12.3"],
        ["8 GB", "all, 19 + 38", "5.06", "180", "250", "569", "12.3"],
        ["12 GB", "all, 19 + 38", "5.06", "180", "250", "569", "12.3"],
    ]
    assert "NVIDIA H200 of which only 4, 6, 8 or 12 GiB were left free; ComfyUI 0.33.0." in readme
    assert readme.endswith("<!-- /your_card -->\n\nThe end.\n")
    assert "old" not in readme
    assert "| 8 GB | 全部，19 + 38 | 5.06 | **180** |" in (folder / "README.zh.md").read_text()
    bars = re.findall(r">([\d.]+)</text>", (folder / "docs/charts/your_card.svg").read_text())
    assert bars == ["190", "267"] * 2 + ["180", "250", "569"] * 2


def test_every_claim_stands_beside_its_target(texts):
    folder = texts(a_proof())
    text = (folder / "docs" / "measurements.md").read_text()
    assert "- NVIDIA H200, ComfyUI 0.33.0: `card-4`, `card-6`, `card-8`, `card-12`.\n" in text
    heads, *rows = cells_of(text)
    assert len(rows) == 10  # no ms: they are in the other table
    assert ["`card-8`", "NF4 here of the fastest by ComfyUI", "1.041", "at most 1.0", "missed"] in rows
    assert len(heads) == 5


def test_a_card_that_was_not_measured_is_no_row(texts):
    proof = a_proof()
    del proof["rows"]["card-6"], proof["rows"]["card-12"]
    readme = (texts(proof) / "README.md").read_text()
    assert [row[0] for row in cells_of(readme)[1:]] == ["4 GB", "8 GB"]
    assert "of which only 4 or 8 GiB were left free" in readme


def test_a_proof_without_cards_leaves_their_table(texts):
    folder = texts({"rows": {}})
    assert "old" in (folder / "README.md").read_text()
    assert [path.name for path in (folder / "docs/data").iterdir()] == ["proof.json"]


def test_no_folder_of_the_machine_that_was_measured_is_told(texts):
    assert "/mine" not in (texts(a_proof()) / "docs/data/proof.json").read_text()


def test_cards_of_two_machines_are_in_no_table(texts):
    proof = a_proof()
    proof["rows"]["card-8"]["about"] = ABOUT | {"comfyui": "0.3.75"}
    with pytest.raises(SystemExit, match="card-4, card-6, card-8, card-12 are of different machines"):
        texts(proof)


def test_the_cards_are_those_of_the_proof():
    """Once it has any; before, no table says that it is from it."""
    if "proof" in DATA and (table := proof_data.your_card(DATA["proof"])):
        assert DATA["your_card"] == table
    else:
        commands = [run["command"] for data in MEASURED.values() for run in data["runs"].values()]
        assert "benchmarks/proof.py" not in commands
