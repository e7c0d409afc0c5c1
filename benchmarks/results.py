"""What all turns gave: a row for each contender at each case, as JSON and as a table, written as they come."""

import dataclasses
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cases import Case
from contenders import CONTENDERS, DENSE_RESIDENT, NF4_RESIDENT, Contender
from timing import least_disturbed
from worker import Failure, Loaded

GIB = 2**30


@dataclass
class Row:
    """One contender at one case, over all its turns. ``failure`` ends it, for all cases if it is lasting."""

    case: Case
    contender: Contender
    turns: list[Any] = field(default_factory=list)
    loaded: Loaded | None = None
    failure: str = ""
    is_lasting: bool = False

    def add(self, answer: Any) -> None:
        if isinstance(answer, Failure):
            self.failure, self.is_lasting = answer.reason, answer.is_lasting
        else:
            self.turns.append(answer)

    @property
    def ms(self) -> float | None:
        """The median of the calls, or steps, of the turn that the machine disturbed least."""
        return least_disturbed([turn.ms for turn in self.turns]) if self.turns else None

    @property
    def sampling_s(self) -> float | None:
        times = [turn.sampling_s for turn in self.turns if turn.sampling_s]
        return least_disturbed(times) if times else None

    def typical(self, figure: str) -> float:
        """The median of all turns, the lower one of two: in the first turn kernels are still being loaded."""
        return statistics.median_low([getattr(turn, figure) for turn in self.turns]) if self.turns else 0.0


class Results:
    """All rows of a run, in ``folder``."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder, self.about = folder, about
        self.rows: list[Row] = []

    def write(self) -> None:
        rows = [dataclasses.asdict(row) | summary(row) for row in self.rows]
        self._replace("compare.json", json.dumps({"about": self.about, "rows": rows}, indent=1))
        self._replace("compare.md", self.markdown())

    def markdown(self) -> str:
        lines = [f"{key}: {value}  " for key, value in self.about.items()]
        for case in dict.fromkeys(row.case for row in self.rows):
            rows = [row for row in self.rows if row.case == case]
            lines += ["", f"## {case.name}", "", described(case), "", *table(rows)]
        names = {row.contender for row in self.rows}
        lines += ["", "## Contenders", ""]
        lines += [f"- `{contender.name}`: {contender.description}." for contender in CONTENDERS if contender in names]
        return "\n".join(lines) + "\n"

    def _replace(self, name: str, text: str) -> None:
        partial = self.folder / f"{name}.partial"
        partial.write_text(text)
        partial.replace(self.folder / name)


def summary(row: Row) -> dict[str, Any]:
    """What all its turns say together: ms, s and GiB; ``ram_gib`` is what loading and running added to its process."""
    before = row.loaded.resident_before if row.loaded is not None else 0
    return {
        "ms": row.ms,
        "sampling_s": row.sampling_s,
        "peak_gib": row.typical("peak_allocated") / GIB,
        "peak_device_gib": row.typical("peak_device") / GIB,
        "ram_gib": (row.typical("resident") - before) / GIB,
        "stays": row.turns[-1].stays if row.turns else {},
    }


def described(case: Case) -> str:
    parts = [f"{case.pixels}x{case.pixels}, batch {case.batch}, {case.text_tokens} text tokens"]
    parts.append(f"{case.steps} steps of euler, cfg {case.cfg:g}" if case.steps else "single calls of the transformer")
    if case.loras:
        parts.append(f"{case.loras} LoRA of rank {case.rank}")
    if case.cap_gib:
        parts.append(f"the device as small as a card of {case.cap_gib:g} GiB")
    if case.bus_gbps:
        parts.append(f"copies padded to a bus of {case.bus_gbps:g} GB/s")
    return "; ".join(parts) + "."


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Markdown; ratios are of times, above 1 where the contender is slower than what all weights in VRAM take."""
    base = {row.contender.name: row.ms for row in rows}
    yield (
        "| contender | ms | NF4 resident = 1 | bf16 resident = 1 | sampling s | peak VRAM GiB | of it torch | load s "
        "| host GiB | output |"
    )
    yield "|---" * 10 + "|"
    for row in rows:
        dynamic = (
            row.loaded is not None and row.loaded.has_dynamic_vram and not row.contender.family.startswith("streamed")
        )
        name = f"{row.contender.name} (dynamic VRAM)" if dynamic else row.contender.name
        if row.ms is None:
            yield f"| {name} | {row.failure or 'not reached'} |" + " |" * 8
            continue
        cells = [
            name,
            f"{row.ms:.1f}",
            *(_ratio(row.ms, base.get(name)) for name in (NF4_RESIDENT, DENSE_RESIDENT)),
            f"{row.sampling_s:.2f}" if row.sampling_s else "",
            f"{row.typical('peak_device') / GIB:.2f}",
            f"{row.typical('peak_allocated') / GIB:.2f}",
            f"{row.loaded.seconds + row.turns[0].load_s + row.turns[0].first_call_s:.1f}" if row.loaded else "",
            f"{row.typical('resident') / GIB:.1f}",
            _difference(row) + (f"; then {row.failure}" if row.failure else ""),
        ]
        yield f"| {' | '.join(cells)} |"


def _ratio(ms: float, base: float | None) -> str:
    return f"{ms / base:.3f}" if base else ""


def _difference(row: Row) -> str:
    differences = [turn.difference for turn in row.turns if turn.difference is not None]
    if not differences:
        return ""
    worst = max(differences, key=lambda difference: (not difference.is_equal, difference.relative_error))
    if worst.is_equal:
        return f"equal to {worst.compared_with}"
    return f"{worst.relative_error:.1e} from {worst.compared_with}"
