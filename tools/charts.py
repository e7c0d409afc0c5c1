"""Draws the charts and writes the tables of the texts from the measured figures in docs/data.

    python3 tools/charts.py
    python3 tools/charts.py --proof results/proof.json

Each file of docs/data is one table: groups (cards, settings), series with a value for each group, and for each series
the run that measured it. The script draws docs/charts/NAME.svg (and NAME.zh.svg where the figures have Chinese names)
and replaces what stands between ``<!-- NAME -->`` and ``<!-- /NAME -->`` in the texts. ``--proof`` first takes over
what `benchmarks/proof.py` has found: all figures as docs/data/proof.json, and your_card.json, which is made of them
(`proof_data`). Standard library only.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import proof_data

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "docs" / "data"
CHARTS = ROOT / "docs" / "charts"

_ROW, _HEAD, _BAR, _FONT = 19, 26, 240, 13
_OURS, _OTHERS = "#2f6fd0", "#a9b1bb"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proof", type=Path, help="proof.json of benchmarks/proof.py")
    given = parser.parse_args()
    if given.proof:
        take_over(json.loads(given.proof.read_text("utf-8")))
    CHARTS.mkdir(exist_ok=True)
    for path, content in (*charts(), *texts()):
        path.write_text(content, "utf-8")
        print(path.relative_to(ROOT))


def read_data() -> dict[str, dict[str, Any]]:
    """Every file of docs/data by its name without ending."""
    return {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(DATA.glob("*.json"))}


def take_over(proof: dict[str, Any]) -> None:
    """Put what a run of benchmarks/proof.py has found into docs/data; a table of which it has nothing stays."""
    found = {"proof": proof_data.condensed(proof)}
    if card := proof_data.your_card(found["proof"]):
        found["your_card"] = card
    for name, data in found.items():
        (DATA / f"{name}.json").write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", "utf-8")


def charts() -> Iterator[tuple[Path, str]]:
    """Path and content of every chart."""
    for name, data in read_data().items():
        for language in data["what"] if "series" in data else ():
            suffix = "" if language == "en" else f".{language}"
            yield CHARTS / f"{name}{suffix}.svg", draw(data, language)


def texts() -> Iterator[tuple[Path, str]]:
    """Path and content of every text that has a table of docs/data."""
    for path in (*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text("utf-8")
        if "<!-- /" in text:
            yield path, with_tables(text, "zh" if ".zh." in path.name else "en")


def with_tables(text: str, language: str) -> str:
    """``text`` with the tables of docs/data between its marks, in ``language``."""
    for name, data in read_data().items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if begin in text:
            before, after = text.split(begin)
            lines = _lines(data, language)
            table = "".join(f"{line}\n" for line in lines)
            text = before + begin + table + end + after.split(end, 1)[1]
    return text


def _lines(data: dict[str, Any], language: str) -> Iterator[str]:
    if "rows" in data:
        return _claims(data)
    return _slots(data, language) if "slots" in data else _table(data, language)


def _claims(data: dict[str, Any]) -> Iterator[str]:
    """Markdown: each claim of a proof beside its target, and what it was measured on."""
    yield from ("## Claims and targets", "", "Each row is one run of a benchmark, by `benchmarks/proof.py`.", "")
    for about, names in proof_data.machines(data).items():
        yield f"- {about}: {', '.join(names)}."
    yield ""
    yield from _header(["row", "what", "figure", "target", "verdict"])
    for name, row in data["rows"].items():
        for figure in proof_data.claims(row):
            cells = (figure["name"], figure["shown"], figure["target"], figure["verdict"])
            yield _line([f"`{name}`", *cells])


def _word(words: dict[str, str], language: str) -> str:
    return words.get(language, words["en"])


def _table(data: dict[str, Any], language: str) -> Iterator[str]:
    """Markdown: a row for each group, a column for each series."""
    heads = [_word(data["groups_head"], language)]
    for series in data["series"]:
        unit = series.get("unit", "" if series.get("is_text") else data["unit"])
        heads.append(_word(series["name"], language) + (f", {unit}" if unit else ""))
    yield from _header(heads)
    for index, group in enumerate(data["groups"]):
        yield _line([group, *(_cell(series, index, language) for series in data["series"])])
    if "note" in data:
        yield from ("", _word(data["note"], language))


def _cell(series: dict[str, Any], index: int, language: str) -> str:
    value = series.get(f"values_{language}", series["values"])[index]
    if value is None:
        return "–"
    return f"**{value}**" if series.get("is_ours") and len(series["values"]) < 6 else str(value)


def _slots(data: dict[str, Any], language: str) -> Iterator[str]:
    """Markdown: seconds that the bytes of a step take on each slot, and the rate that is assumed."""
    yield from _header([_word(data["groups_head"], language), "GB/s", *data["gb_a_step"]])
    for slot in data["slots"]:
        gbps = slot["lanes"] * slot["gbps_a_lane"] * data["share_of_nominal_rate"]
        seconds = [f"{gb / gbps:.2f} s" for gb in data["gb_a_step"].values()]
        yield _line([slot["name"], f"{gbps:.1f}", *seconds])


def _header(heads: Sequence[str]) -> Iterator[str]:
    yield _line(heads)
    yield "|" + "---|" * len(heads)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw(data: dict[str, Any], language: str) -> str:
    """An SVG: one bar for each value, all on one scale; what this package does is blue."""
    drawn = [series for series in data["series"] if not series.get("is_text")]
    most = max(value for series in drawn for value in series["values"] if value is not None)
    names = data["groups"] if len(drawn) == 1 else [_word(series["name"], language) for series in drawn]
    left = 20 + max(map(_width, names))
    shapes: list[str] = []
    y = 34
    for index, group in enumerate(data["groups"]):
        values = [(series, series["values"][index]) for series in drawn if series["values"][index] is not None]
        if len(drawn) > 1 and values:
            shapes.append(_text(12, y + 13, group, "bold"))
            y += _HEAD - 6
        for series, value in values:
            label = group if len(drawn) == 1 else _word(series["name"], language)
            is_ours = "this package" in group if len(drawn) == 1 else series.get("is_ours", False)
            shapes += _bar(left, y, label, value, _BAR * value / most, is_ours)
            y += _ROW
        y += 6 if len(drawn) > 1 and values else 0
    title = _text(12, 21, f"{_word(data['what'], language)} ({data['unit']})", "bold")
    width, height = max(left + _BAR + 60, 24 + int(1.1 * _width(title.split(">")[1]))), y + 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">\n'
        f'<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>\n'
        + "\n".join([title, *shapes])
        + "\n</svg>\n"
    )


def _bar(left: int, y: int, label: str, value: float, length: float, is_ours: bool) -> list[str]:
    colour, weight = (_OURS, "bold") if is_ours else (_OTHERS, "normal")
    return [
        _text(left - 6, y + 13, label, weight, "end"),
        f'<rect x="{left}" y="{y + 2}" width="{length:.1f}" height="{_ROW - 5}" fill="{colour}"/>',
        _text(left + length + 5, y + 13, str(value), weight),
    ]


def _text(x: float, y: int, text: str, weight: str, anchor: str = "start") -> str:
    style = f'font-family="Liberation Sans, Helvetica, Arial, sans-serif" font-size="{_FONT}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y}" {style} fill="#1f2328" text-anchor="{anchor}">{escape(text)}</text>'


def _width(text: str) -> int:
    """Pixels, about: a Chinese character is as wide as the font is high, others half as wide."""
    return sum(_FONT if ord(letter) > 0x2E80 else 7 for letter in text)


if __name__ == "__main__":
    main()
