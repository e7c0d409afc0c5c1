"""What it wins to compute the modulation ahead: samplings with it, against samplings without it.

    COMFYUI_PATH=~/ComfyUI python benchmarks/modulation.py                       (about 200 s on a data-centre GPU)
    COMFYUI_PATH=~/ComfyUI python benchmarks/modulation.py --only '0/0*' 'auto*'

The modulation Linears are 27 % of the blocks' bytes and see nothing but the timestep, the guidance and the pooled
prompt. Two models of one file run in turns: in one ("before") the modulation is a part of its blocks, which stay or are
streamed with it; the other ("ahead") is as the package has it. With all blocks resident, with none, and as many prompts
of one step each. Where a budget has room for all blocks but not for the modulation, only the other one is measured: its
peak. Latents must be bit-equal, or it fails. Times are of one sampling, in the turn that the machine disturbed least.
Each line has its target, and whether it is kept. Run it with ComfyUI's Python; it prints a table and writes
``modulation.json``.
"""

import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import needs_torch  # noqa: F401
import orderly
import torch
from arguments import begin, parser_for, positive
from bus import slow_bus
from cases import Case, matching
from inside_comfyui import import_package, use_allocator_of_comfyui
from memory import Use
from timing import least_disturbed, seconds
from weights import Files

GIB = 2**30
NO_SLOWER = 1.02
"""Of the time before; two hundredths are noise."""

_COUNTS = {"all resident": (19, 38), "0/0": (0, 0), "automatic": ()}


@dataclass(frozen=True)
class Row:
    """``prompts`` samplings, one after the other, of each model.

    ``setting`` names what stays; "budget" has room for all blocks, but not for the modulation. They may take at most
    ``most_ratio`` of the time before and ``most_gib`` of the device; 0 where there is no target.
    """

    setting: str
    case: Case
    prompts: int = 1
    most_ratio: float = NO_SLOWER
    most_gib: float = 0.0

    @property
    def name(self) -> str:
        bus = f" {self.case.bus_gbps:g}GB/s" if self.case.bus_gbps else ""
        return f"{self.setting} {self.case.pixels} {self.prompts}x{self.case.steps}{bus}"


def _row(setting: str, pixels: int, steps: int, bus_gbps: float = 0.0, **more: Any) -> Row:
    return Row(setting, Case("", pixels, steps=steps, bus_gbps=bus_gbps), **more)


def rows_of(prompts: int) -> tuple[Row, ...]:
    """All of them, the most telling first; ``prompts`` is for those of many prompts."""
    return (
        *(_row("all resident", pixels, steps) for pixels in (1024, 512) for steps in (4, 20, 1)),
        _row("all resident", 1024, 4, 12.0),
        _row("budget", 1024, 4, most_ratio=0.0, most_gib=5.0),
        _row("automatic", 1024, 4),
        _row("0/0", 512, 20, most_ratio=0.78),
        _row("0/0", 1024, 20, 12.0, most_ratio=0.78),
        _row("all resident", 512, 1, prompts=prompts),
        _row("0/0", 512, 1, prompts=prompts),
    )


TINY_ROWS = (
    *(Row(setting, Case("", 64, steps=2, text_tokens=8)) for setting in _COUNTS),
    Row("budget", Case("", 64, steps=2, text_tokens=8), most_ratio=0.0, most_gib=5.0),
    Row("0/0", Case("", 96, steps=1, text_tokens=8), prompts=3),
)


def load_as_before(path: Path) -> Any:
    """A streamed model whose modulation is a part of its blocks."""
    import comfy.model_management

    from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue
    from flux_nf4.nf4_loader.models.fill import fill
    from flux_nf4.nf4_loader.models.transformers import block_groups, build_transformer, materialise
    from flux_nf4.offload.comfyui import modulation
    from flux_nf4.offload.comfyui.patcher import StreamedModelPatcher
    from flux_nf4.offload.comfyui.streaming import attach_streaming

    catalogue = read_catalogue(path)
    model = build_transformer(catalogue)
    materialise(model.diffusion_model)
    fill(model, catalogue, lambda _: None)
    module: Any = modulation
    names, module._names = module._names, lambda _: None  # no model has any
    try:
        attach_streaming(model, block_groups(model))
    finally:
        module._names = names
    management = comfy.model_management
    return StreamedModelPatcher(
        model, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )


def measure(patchers: dict[str, Any], row: Row, rounds: int) -> dict[str, Any]:
    """Seconds of one of the row's samplings with each model, in turns, and what they take of the device at most."""
    from comfy_model import at_work

    case, names = row.case, ("ahead",) if row.setting == "budget" else tuple(patchers)
    times: dict[str, list[list[float]]] = {name: [] for name in names}
    peaks = dict.fromkeys(names, 0.0)
    latents: list[torch.Tensor] = []
    device = patchers["ahead"].load_device
    with slow_bus(device, case.bus_gbps) as bus_gbps:
        for _ in range(rounds):
            for name in names:
                before = Use.at_rest(device).allocated  # of the other model, as much as ComfyUI leaves there
                with at_work(_with_setting(patchers[name], row.setting), case) as model:
                    model.sample(_nothing, 1)
                    _reset_peak(device)
                    sample = functools.partial(_sample, model, latents)
                    times[name].append([seconds(sample, device) for _ in range(row.prompts)])
                    peaks[name] = max(peaks[name], _peak_gib(device, before))
    if not all(torch.equal(latent, latents[0]) for latent in latents):
        sys.exit(f"{row.name}: what is computed ahead gives another picture")
    typical = {f"{name}_s": least_disturbed(turns) for name, turns in times.items()}
    found = {"name": row.name, "bus_gbps": bus_gbps, "most_ratio": row.most_ratio, "most_gib": row.most_gib}
    return found | typical | {f"{name}_gib": peak for name, peak in peaks.items()}


def _with_setting(patcher: Any, setting: str) -> Any:
    from streamed import with_residency

    if setting != "budget":
        return with_residency(patcher, *_COUNTS[setting])
    streaming = patcher.model.streaming
    blocks = sum(size.nbytes for size in streaming.streamer.sizes())
    return with_residency(patcher, budget_gib=(streaming.needed_bytes + blocks) / GIB)


def _sample(model: Any, latents: list[torch.Tensor]) -> None:
    latents.append(model.sample(_nothing))


def _nothing() -> None:
    pass


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak_gib(device: torch.device, before: int) -> float:
    return (torch.cuda.max_memory_allocated(device) - before) / GIB if device.type == "cuda" else 0.0


def run(files: Files, rows: Sequence[Row], rounds: int, output: Path) -> dict[str, Any]:
    """Measure each row; the figures so far are in ``output`` after each."""
    from comfy_model import at_work
    from streamed import load

    with torch.inference_mode():
        patchers = {"before": load_as_before(files.nf4()), "ahead": load(files.nf4())}
        with at_work(patchers["before"].clone(), rows[0].case) as model:
            model.sample(_nothing, 1)  # in ComfyUI 0.33 the first forward of a process rounds otherwise
        weights = patchers["ahead"].model.streaming.modulation.streamer.sizes()
        results: dict[str, Any] = {"modulation_bytes": sum(size.nbytes for size in weights), "rows": []}
        for row in rows:
            found = measure(patchers, row, rounds)
            print(line_of(found), flush=True)
            results["rows"].append(found)
            (output / "modulation.json").write_text(json.dumps(results))
    return results


COLUMNS = (
    "blocks that stay, pixels, samplings x steps",
    "before, s",
    "ahead, s",
    "ratio",
    "at most",
    "peak before, GiB",
    "peak ahead, GiB",
    "at most",
    "verdict",
)
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def line_of(row: dict[str, Any]) -> str:
    """A line of the table; the last column says whether the targets are kept."""
    before, ahead = row.get("before_s"), row["ahead_s"]
    ratio = ahead / before if before else None
    kept = [(value, most) for value, most in ((ratio, row["most_ratio"]), (row["ahead_gib"], row["most_gib"])) if most]
    cells = (
        row["name"],
        _figure(before, 3),
        _figure(ahead, 3),
        _figure(ratio, 3),
        _figure(row["most_ratio"] or None, 2),
        _figure(row.get("before_gib"), 2),
        _figure(row["ahead_gib"], 2),
        _figure(row["most_gib"] or None, 2),
        "held" if all(value is not None and value <= most for value, most in kept) else "missed",
    )
    return f"| {' | '.join(cells)} |"


def _figure(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--rounds", type=positive, default=3, help="turns of each model at each row")
    parser.add_argument("--prompts", type=positive, default=30, help="how many are many: samplings of one step each")
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="these rows; * and ? stand for any")
    given = parser.parse_args()
    rows = TINY_ROWS if given.dry_run else rows_of(given.prompts)
    try:
        wanted = matching([row.name for row in rows], given.only)
    except ValueError as error:
        parser.error(str(error))
    use_allocator_of_comfyui()
    begin(given)
    import_package()
    files = Files(given.folder, given.checkpoint, given.dry_run)
    files.enter()
    print(HEAD, flush=True)
    results = run(files, [row for row in rows if row.name in wanted], given.rounds, given.output)
    print(f"{results['modulation_bytes'] / 1e6:,.1f} MB of modulation weights")


if __name__ == "__main__":
    orderly.run(main)
