"""What the rows of a proof are made of: figures and their targets, read from the JSON of the benchmarks."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_DIGITS = {"": 3, "s": 2, "ms": 1, "GiB": 2, "MiB": 0, "count": 0}
"""Decimals by the unit; a figure without unit is a ratio."""


@dataclass(frozen=True)
class Figure:
    """One number, or text. None: not measured, and ``note`` says why.

    ``most``: the target, which it must not be above. Without one it stands beside the others. ``note`` is what a reader
    of the number must know.
    """

    name: str
    value: float | str | None
    unit: str = ""
    most: float | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        if self.most is None or isinstance(self.value, str):
            return "beside"
        return "held" if self.value <= self.most else "missed"

    @property
    def shown(self) -> str:
        text = self._with_unit(self.value)
        if self.verdict == "missed" and self.most is not None and text == self._with_unit(self.most):
            text = self._with_unit(self.value, more=1)
        return f"{text} ({self.note})" if self.note else text

    @property
    def target(self) -> str:
        return "" if self.most is None else f"at most {self._with_unit(self.most)}"

    def _with_unit(self, value: float | str | None, more: int = 0) -> str:
        """With ``more`` decimals than usual."""
        if value is None or isinstance(value, str):
            return value or "–"
        number = f"{value:.{_DIGITS[self.unit] + more}f}"
        return number if self.unit in ("", "count") else f"{number} {self.unit}"


def quotient(name: str, value: Any, to: Any, most: float | None = None, note: str = "") -> Figure:
    """``value`` against ``to``; not measured where one of them is not."""
    is_whole = bool(value and to)
    return Figure(name, value / to if is_whole else None, most=most, note=note)


class Compared:
    """What `compare.py` has found."""

    def __init__(self, found: dict[str, Any]) -> None:
        self._rows = {(row["case"]["name"], row["contender"]["name"]): row for row in found["rows"]}

    def ms(self, case: str, name: str) -> float | None:
        ms: float | None = self._rows.get((case, name), {}).get("ms")
        return ms

    def fastest(self, case: str, names: tuple[str, ...]) -> str | None:
        """Which of these took least time."""
        times = {name: ms for name in names if (ms := self.ms(case, name)) is not None}
        return min(times, key=times.__getitem__) if times else None

    def ratio(self, name: str, of: str, to: str, case: str, most: float | None = None, to_case: str = "") -> Figure:
        """The time of ``of`` against that of ``to``, which may be at another case."""
        why = self._why(case, of) or self._why(to_case or case, to)
        return quotient(name, self.ms(case, of), self.ms(to_case or case, to), most, why)

    def value(self, name: str, case: str, of: str, key: str, unit: str, most: float | None = None) -> Figure:
        """What ``summary`` of its row has under this key."""
        why = self._why(case, of)
        return Figure(name, None if why else self._rows[case, of][key], unit, most, why)

    def keeps_all(self, case: str, of: str) -> bool:
        """Whether all blocks of Flux.1 stayed."""
        return not self._why(case, of) and list(self._rows[case, of]["stays"].values()) == [19, 38]

    def stays(self, name: str, case: str, of: str) -> Figure:
        """Blocks of each kind that stayed, as "7 + 7"; "all" in front of it where those of Flux.1 are all there."""
        why = self._why(case, of)
        counts = [] if why else list(self._rows[case, of]["stays"].values())
        text = " + ".join(map(str, counts))
        is_all, is_none = self.keeps_all(case, of), not any(counts)
        return Figure(name, None if why else f"all, {text}" if is_all else "none" if is_none else text, note=why)

    def unequal(self, name: str, case: str, base: str, contenders: tuple[str, ...]) -> Figure:
        """How many outputs of these contenders are not bit-equal to that of ``base``."""
        turns = [turn for one in contenders for turn in self._rows.get((case, one), {"turns": []})["turns"]]
        differences = [turn["difference"] for turn in turns if turn["difference"] is not None]
        if not differences or any(one["compared_with"] != base for one in differences):
            return Figure(name, None, "count", 0, f"no output was compared with {base}")
        return Figure(name, sum(not one["is_equal"] for one in differences), "count", 0)

    def _why(self, case: str, name: str) -> str:
        row = self._rows.get((case, name))
        if row is None:
            return f"{name} was not run"
        return "" if row["ms"] is not None else f"{name}: {row['failure'] or 'not reached'}"


NATIVE = ("int8", "w4a8", "nvfp4")
THEIRS = (*(f"comfy-{kind}" for kind in NATIVE), "comfy-fp8", "gguf-q4")
OURS = ("streamed-auto", *(f"comfy-{kind}-streamed" for kind in NATIVE))


def nf4(found: dict[str, Any]) -> Iterator[Figure]:
    compared, case = Compared(found), "1024"
    yield compared.ratio("0/0 of bitsandbytes' own modules, resident", "streamed-0-0", "bnb-nf4", case, 1.02)
    yield compared.value("peak at 0/0", case, "streamed-0-0", "peak_gib", "GiB", 0.75)
    ours = ("streamed-0-0", "streamed-resident")
    yield compared.unequal("outputs that are not bit-equal to bitsandbytes'", case, "bnb-nf4", ours)
    yield compared.ratio("all resident of bitsandbytes' own modules", "streamed-resident", "bnb-nf4", case)


def card(found: dict[str, Any], gib: int) -> Iterator[Figure]:
    """A card of ``gib``: who is fastest, and what streaming wins for each format; and all times."""
    compared, plain, lora = Compared(found), f"1024-cap{gib}", f"1024-lora16-cap{gib}"
    for case, ending in ((plain, ""), (lora, ", with a LoRA")):
        rival = compared.fastest(case, THEIRS)
        fastest = compared.ratio(f"NF4 here of the fastest by ComfyUI{ending}", OURS[0], rival or THEIRS[0], case, 1.0)
        yield Figure(fastest.name, fastest.value, most=1.0, note=fastest.note or rival or "")
        for kind in NATIVE:
            name = f"{kind} streamed of {kind} by ComfyUI{ending}"
            yield compared.ratio(name, f"comfy-{kind}-streamed", f"comfy-{kind}", case, 1.0)
    if compared.keeps_all(plain, OURS[0]):
        yield compared.value("peak with all of Flux.1 resident", plain, OURS[0], "peak_gib", "GiB", 5.0)
    yield from card_table(compared, plain)


def card_table(compared: Compared, case: str) -> Iterator[Figure]:
    yield compared.stays("blocks that stay", case, OURS[0])
    yield compared.value("peak VRAM", case, OURS[0], "peak_gib", "GiB")
    for name in (*OURS, *THEIRS):
        yield compared.value(name, case, name, "ms", "ms")


def lora(found: dict[str, Any]) -> Iterator[Figure]:
    compared = Compared(found)
    for gib in (4, 6, 8):
        for name in OURS:
            case, without = f"1024-lora16-cap{gib}", f"1024-cap{gib}"
            yield compared.ratio(f"{name} on {gib} GiB, with a LoRA of without", name, name, case, 1.08, without)


def card_12(found: dict[str, Any]) -> Iterator[Figure]:
    yield from card_table(Compared(found), "1024-cap12")


def v1(found: dict[str, Any]) -> Iterator[Figure]:
    compared, case, base = Compared(found), "1024", "bnb-nf4-v1"
    for name, setting, most in (
        ("resident", "resident", 1.02),
        ("0/0", "0-0", 1.03),
        ("compiled", "resident-compiled", 0.90),
    ):
        yield compared.ratio(f"{name} of bitsandbytes' modules", f"streamed-v1-{setting}", base, case, most)
    exact = ("streamed-v1-resident", "streamed-v1-0-0")
    yield compared.unequal("outputs that are not bit-equal to bitsandbytes'", case, base, exact)


def compiled(found: dict[str, Any]) -> Iterator[Figure]:
    name = "blocks compiled, 0/0, of dense bf16 resident"
    yield Compared(found).ratio(name, "streamed-0-0-compiled", "comfy-bf16", "1024", 0.90)


def int8(found: dict[str, Any]) -> Iterator[Figure]:
    medians = {(row["pixels"], row["blocks"]): row["ratios"][1] for row in found["rows"]}
    for pixels in (512, 1024, 1536):
        for blocks, what in (("all", "all blocks stay"), ("none", "none stay")):
            yield Figure(f"int8 where faster of exact, {pixels}, {what}", medians.get((pixels, blocks)), most=1.01)


def first_step(found: dict[str, Any]) -> Iterator[Figure]:
    rows = {row["contender"]: row for row in found["rows"]}
    parts = ("load_s", "ready_s", "first_step_s")
    ours = rows.get("streamed-0-0", {})
    until = ours["load_s"] + ours["ready_s"] if "load_s" in ours else None
    yield Figure("until the first step can begin, 0/0", until, "s", 0.5, ours.get("failure", ""))
    for name, row in rows.items():
        done = sum(row[part] for part in parts) if "load_s" in row else None
        yield Figure(f"until it is done, {name}", done, "s", note=row.get("failure", ""))


def flux2(found: dict[str, Any]) -> Iterator[Figure]:
    for model, setting in (("dev", "automatic on 8 GiB"), ("klein-4b", "automatic on 4 GiB")):
        rows = {row["setting"]: row for row in found["models"].get(model, ())}
        row = rows.get(setting, {})
        yield Figure(f"{model}, {setting}, of resident", row.get("ratio"), most=1.05)
        yield Figure(f"{model}, {setting}, peak", row.get("peak_gib"), "GiB")


def flux2_encoders(found: dict[str, Any]) -> Iterator[Figure]:
    small = found["rows"][-1]
    yield Figure(f"Mistral 3 within {small['budget_gib']:g} GiB of resident", small["ratio"], most=1.15)
    moved = found.get("workflow", {}).get("moved")
    yield Figure("blocks of dev that a second prompt on 8 GiB moved", moved, "count", 0)


def new_prompt(found: dict[str, Any]) -> Iterator[Figure]:
    rows = found["rows"]
    caps = sorted({row["cap_gib"] for row in rows} - {0})
    words = {"itself": "a new prompt", "nothing": "the first prompt", "another model": "a prompt after another model"}
    for cap in caps:
        for after, name in words.items():
            small, whole = (_picture_s(rows, gib, after) for gib in (cap, 0))
            most = 1.05 if after == "itself" else None
            note = f"{small:.2f} s" if small is not None else ""
            yield quotient(f"{name}, {cap:g} GiB of the whole card", small, whole, most, note)
    differing = sum(bool(row["latent"]) for row in rows)
    yield Figure("latents that are not those of the whole card", differing, "count", 0)
    yield Figure("RAM in total", found.get("ram_gib"), "GiB")


def _picture_s(rows: list[dict[str, Any]], cap: float, after: str) -> float | None:
    """Seconds from the prompt to the picture: the median."""
    runs = [row for row in rows if (row["cap_gib"], row["after"]) == (cap, after)]
    return statistics.median(run["encode"] + run["sample"] + run["decode"] for run in runs) if runs else None


def cfg_split(found: dict[str, Any]) -> Iterator[Figure]:
    for row in found["rows"]:
        note = f"host busy {row['host_busy']:.2f} of the time"
        yield Figure(f"two GPUs of one, {row['resident']}, {row['pixels']}", row["ratio"], most=0.65, note=note)


def two_workers(found: dict[str, Any]) -> Iterator[Figure]:
    ratio = found.get("processes", {}).get("file", {}).get("grown_gib_ratio")
    yield Figure("RAM that two workers take to load, of one", ratio, most=1.05)


def soak(found: dict[str, Any]) -> Iterator[Figure]:
    encoder = "with" if found["encodes"] else "without"
    yield Figure("prompts", len(found["done"]), "count", note=f"{encoder} a text encoder")
    yield Figure("pictures other than the first of their kind", len(found["other_pictures"]), "count", 0)
    for kind, slack in found["slack"].items():
        nbytes = found["grown"].get(kind)
        yield Figure(f"growth, {kind}", None if nbytes is None else nbytes / 2**20, "MiB", slack / 2**20)
