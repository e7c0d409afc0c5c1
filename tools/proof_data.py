"""What docs/data keeps of a run of benchmarks/proof.py: its figures, and the table of cards that is made of them.

Standard library only.
"""

from collections.abc import Iterator, Sequence
from typing import Any

CARDS_GB = (4, 6, 8, 12)
_COMMAND = "benchmarks/proof.py"
_OF_MACHINE = ("date", "device", "host", "comfyui", "versions", "commit")
_OF_FIGURE = ("name", "value", "unit", "most", "note", "shown", "target", "verdict")

_STEPS = {
    "streamed-auto": {"en": "this package", "zh": "本包"},
    "comfy-int8": {"en": "ComfyUI, int8", "zh": "ComfyUI int8"},
    "comfy-w4a8": {"en": "ComfyUI, W4A8", "zh": "ComfyUI W4A8"},
    "comfy-nvfp4": {"en": "ComfyUI, NVFP4", "zh": "ComfyUI NVFP4"},
    "comfy-fp8": {"en": "ComfyUI, fp8", "zh": "ComfyUI fp8"},
    "gguf-q4": {"en": "ComfyUI-GGUF, Q4_0", "zh": "ComfyUI-GGUF Q4_0"},
}
"""Columns of times by the proof's name of the contender. This package's is the first."""


def condensed(proof: dict[str, Any]) -> dict[str, Any]:
    """``proof`` without what is of the machine's own folders and of how the run went."""
    rows = {
        name: {
            "what": row["what"],
            "command": row.get("command", ""),
            "about": {key: value for key, value in row.get("about", {}).items() if key in _OF_MACHINE},
            "figures": [{key: figure[key] for key in _OF_FIGURE} for figure in row["figures"]],
        }
        for name, row in proof["rows"].items()
    }
    return {"rows": rows}


def claims(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The figures of a row that the table of claims shows: times of single contenders are in the table of cards."""
    return (figure for figure in row["figures"] if figure["unit"] != "ms")


def machines(proof: dict[str, Any]) -> dict[str, list[str]]:
    """On what each row was measured: the names of its rows by the machine and the ComfyUI."""
    found: dict[str, list[str]] = {}
    for name, row in proof["rows"].items():
        about = row["about"]
        found.setdefault(f"{_card(about)}, ComfyUI {about.get('comfyui', 'unknown')}", []).append(f"`{name}`")
    return found


def your_card(proof: dict[str, Any]) -> dict[str, Any] | None:
    """The table of the cards of 4, 6, 8 and 12 GB that were measured; None where none was.

    A column of which nothing was measured is left out.

    Raises:
        SystemExit: the cards were measured on different machines.
    """
    rows = {gb: proof["rows"][f"card-{gb}"] for gb in CARDS_GB if f"card-{gb}" in proof["rows"]}
    if not rows:
        return None
    abouts = [row["about"] for row in rows.values()]
    if len({(_card(about), about.get("comfyui")) for about in abouts}) > 1:
        names = ", ".join(f"card-{gb}" for gb in rows)
        raise SystemExit(f"the rows {names} are of different machines: run them on one")
    card, comfyui = _card(abouts[0]), abouts[0].get("comfyui", "unknown")
    stays = [_value(row, "blocks that stay") for row in rows.values()]
    series: list[dict[str, Any]] = [
        {
            "name": {"en": "blocks that stay in VRAM", "zh": "常驻显存的块"},
            "run": "cards",
            "is_text": True,
            "values": stays,
            "values_zh": [_in_chinese(text) for text in stays],
        },
        {
            "name": {"en": "peak VRAM", "zh": "显存峰值"},
            "run": "cards",
            "unit": "GiB",
            "is_text": True,
            "values": [_rounded(_value(row, "peak VRAM"), 2) for row in rows.values()],
        },
    ]
    for index, (contender, name) in enumerate(_STEPS.items()):
        values = [_rounded(_value(row, contender), 0) for row in rows.values()]
        series.append({"name": name, "run": "cards", **({} if index else {"is_ours": True}), "values": values})
    ram = _rounded(_value(proof["rows"].get("new-prompt"), "RAM in total"), 1)
    series.append(
        {
            "name": {"en": "RAM in total", "zh": "内存合计"},
            "run": "workflow",
            "unit": "GiB",
            "is_text": True,
            "values": [ram for _ in rows],
        }
    )
    series = [column for column in series if any(value is not None for value in column["values"])]
    taken = f"{card} of which only {_listed(list(rows))} GiB were left free"
    runs = {
        "cards": {
            "card": taken,
            "comfyui": comfyui,
            "what": "one transformer forward, batch 1, 512 text tokens; medians; highest of torch's allocator",
            "command": _COMMAND,
        },
        "workflow": {
            "card": card,
            "comfyui": comfyui,
            "what": "what the process's memory grew by, from before the file is loaded until after a first prompt with "
            "text encoders and VAE; the same on any card",
            "command": _COMMAND,
        },
    }
    used = {column["run"] for column in series}
    return {
        "what": {"en": "Time of one sampling step, 1024x1024", "zh": "一个采样步的耗时，1024x1024"},
        "unit": "ms",
        "groups_head": {"en": "your card", "zh": "您的显卡"},
        "groups": [f"{gb} GB" for gb in rows],
        "note": {"en": f"{taken}; ComfyUI {comfyui}.", "zh": f"{card}（仅留出相应显存）；ComfyUI {comfyui}。"},
        "runs": {name: run for name, run in runs.items() if name in used},
        "series": series,
    }


def _card(about: dict[str, str]) -> str:
    return about.get("device", "unknown").split(",")[0]


def _value(row: dict[str, Any] | None, name: str) -> Any:
    figures = row["figures"] if row is not None else ()
    return next((figure["value"] for figure in figures if figure["name"] == name), None)


def _rounded(value: float | None, digits: int) -> float | None:
    if value is None:
        return None
    return round(value, digits) if digits else round(value)


def _in_chinese(text: str | None) -> str | None:
    if text is None:
        return None
    return text.replace("all, ", "全部，").replace("none", "无")


def _listed(numbers: Sequence[int]) -> str:
    """Numbers as a sentence has them: "4", "4 or 6", "4, 6 or 8"."""
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last
