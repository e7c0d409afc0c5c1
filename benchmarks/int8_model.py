"""Whether a whole model is ever slower with `int8 where faster` than with `exact`: steps of both in turns, one by one.

    COMFYUI_PATH=~/ComfyUI python benchmarks/int8_model.py
    COMFYUI_PATH=~/ComfyUI python benchmarks/int8_model.py --pixels 512 --pairs 200

Where no layer computes in int8, both do the same, and differ in what the host asks for each layer. What else a machine
does slows it for seconds at a time, so each step is compared with the one right before it or after it. Prints the
medians, and the median of the pairs' ratios with the range of their middle half. Run it with ComfyUI's Python. Without
a checkpoint it makes one with random weights (7 GB), kept in ``--folder``. Writes ``int8_model.json``.
"""

import json
import statistics
from dataclasses import asdict, dataclass
from typing import Any

import needs_torch  # noqa: F401
import orderly
import torch
from about import about
from arguments import begin, parser_for, positive
from cases import Case
from inside_comfyui import import_package, use_allocator_of_comfyui
from int8_layers import FASTER, SHAPES, rows_of_pictures
from timing import seconds
from weights import Files

BLOCKS = {"all": (19, 38), "none": (0, 0)}
"""How many stay, of both kinds."""


@dataclass(frozen=True)
class Row:
    """ms are medians; ``ratios`` are the quartiles of int8 by exact; how many kinds of layers compute in int8."""

    pixels: int
    blocks: str
    kinds_in_int8: int
    exact_ms: float
    int8_ms: float
    ratios: tuple[float, float, float]


class Both:
    """The layers of a loaded model, which can be switched between both ways without anything else being done."""

    def __init__(self, model: Any) -> None:
        modules = model.diffusion_model.modules()
        self._own = {module: module.int8 for module in modules if getattr(module, "int8", None) is not None}

    def use(self, *, int8: bool) -> None:
        for layer, own in self._own.items():
            layer.int8 = own if int8 else None


def measure(patcher: Any, pixels: int, blocks: str, pairs: int, case: Case | None = None) -> Row:
    from comfy_model import at_work
    from streamed import with_residency

    from flux_nf4.nodes_compute import choose

    clone = with_residency(patcher, *BLOCKS[blocks])
    choose(clone, FASTER)
    times: dict[bool, list[float]] = {True: [], False: []}
    with at_work(clone, case or Case("", pixels)) as model, torch.inference_mode():
        model.load()
        both = Both(model.patcher.model)
        for is_int8 in (True, False) * 2:  # compiles, measures, allocates
            both.use(int8=is_int8)
            seconds(model.step, model.device)
        for number in range(pairs):
            for is_int8 in (True, False) if number % 2 else (False, True):
                both.use(int8=is_int8)
                times[is_int8].append(1000 * seconds(model.step, model.device))
        both.use(int8=True)
    ratios = [int8 / exact for int8, exact in zip(times[True], times[False], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if pairs > 1 else ratios * 3
    return Row(
        pixels,
        blocks,
        kinds_in_int8(pixels),
        statistics.median(times[False]),
        statistics.median(times[True]),
        (low, middle, high),
    )


def kinds_in_int8(pixels: int) -> int:
    """Of so many kinds of layers it was measured that int8 is faster, with the rows that such a picture has."""
    from flux_nf4.nf4_loader.linear import measured

    counts = {count for name in SHAPES for count in rows_of_pictures(name, [pixels])}
    return sum(timing.int8_is_faster for case, timing in measured.timings.items() if case.rows in counts)


def table(rows: list[Row]) -> str:
    lines = [
        "| pixels | blocks that stay | kinds of layers in int8 | exact, ms | int8 where faster | ratio | middle half |",
        "|" + "---|" * 7,
    ]
    for row in rows:
        low, middle, high = row.ratios
        lines.append(
            f"| {row.pixels} | {row.blocks} | {row.kinds_in_int8} | {row.exact_ms:.1f} | {row.int8_ms:.1f} | "
            f"{middle:.3f} | {low:.3f} to {high:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--pixels", type=positive, nargs="+", default=[512, 1024, 1536], help="sides of the pictures")
    parser.add_argument("--pairs", type=positive, default=60, help="steps of each way, at each size")
    given = parser.parse_args()
    use_allocator_of_comfyui()
    begin(given)
    import_package()
    from streamed import load

    files = Files(given.folder, given.checkpoint, given.dry_run)
    files.enter()
    tiny = Case("", 64, text_tokens=8) if given.dry_run else None
    patcher = load(files.nf4())
    rows = []
    for pixels in given.pixels:
        for blocks in BLOCKS:
            rows.append(measure(patcher, pixels, blocks, given.pairs, tiny))
            result = {"about": about(), "rows": [asdict(row) for row in rows]}
            (given.output / "int8_model.json").write_text(json.dumps(result, indent=1))
    print(table(rows))


if __name__ == "__main__":
    orderly.run(main)
