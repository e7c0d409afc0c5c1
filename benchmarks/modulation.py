"""What it wins to compute the modulation ahead: samplings with it, against samplings without it.

    COMFYUI_PATH=~/ComfyUI python benchmarks/modulation.py

The modulation Linears are 27 % of the blocks' bytes and see nothing but the timestep, the guidance and the pooled
prompt. Two models of one file run in turns: in one the modulation is a part of its blocks, which stay or are streamed
with it; in the other it is computed ahead, as the package does it. Samplings of 1, 4 and 20 steps, with all blocks
resident and with all streamed, over the bus as it is and over slower ones; then many prompts of one step each. Latents
must be bit-equal, or it fails. Run it with ComfyUI's Python; it prints a table and writes ``modulation.json``.
"""

import functools
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import needs_torch  # noqa: F401
import torch
from arguments import begin, parser_for
from bus import slow_bus
from cases import Case
from inside_comfyui import import_package
from timing import seconds
from weights import Files

GIB = 2**30
SETTINGS = {"all resident": (19, 38), "0/0": (0, 0)}
CASES = (
    *(Case("", pixels, steps=steps) for pixels in (1024, 512) for steps in (1, 4, 20)),
    *(Case("", pixels, steps=20, bus_gbps=gbps) for pixels in (1024, 512) for gbps in (25.0, 12.0)),
)
TINY_CASES = tuple(Case("", pixels, steps=steps, text_tokens=8) for pixels in (64, 96) for steps in (1, 3))


def load_as_before(path: Path) -> Any:
    """A streamed model whose modulation is a part of its blocks."""
    import comfy.model_management

    from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue
    from flux_nf4.nf4_loader.models.fill import fill
    from flux_nf4.nf4_loader.models.transformers import block_groups, build_flux, materialise
    from flux_nf4.offload.comfyui import modulation
    from flux_nf4.offload.comfyui.patcher import StreamedModelPatcher
    from flux_nf4.offload.comfyui.streaming import attach_streaming

    catalogue = read_catalogue(path)
    model = build_flux(catalogue)
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


def measure(patchers: dict[str, Any], setting: str, case: Case, rounds: int, prompts: int = 1) -> dict[str, Any]:
    """Seconds of ``prompts`` samplings with each model, in turns, and what they take of the device: medians."""
    from comfy_model import at_work
    from streamed import with_residency

    row: dict[str, Any] = {"setting": setting, "pixels": case.pixels, "steps": case.steps, "prompts": prompts}
    times: dict[str, list[float]] = {name: [] for name in patchers}
    latents = []
    device = next(iter(patchers.values())).load_device
    with slow_bus(device, case.bus_gbps) as row["bus_gbps"]:
        for _ in range(rounds):
            for name, patcher in patchers.items():
                with at_work(with_residency(patcher, *SETTINGS[setting]), case) as model:
                    latents.append(model.sample(_nothing).clone())
                    _reset_peak(device)
                    times[name].append(seconds(functools.partial(_sample, model, prompts), device))
                    row[f"{name}_gib"] = _peak_gib(device)
    if not all(torch.equal(latent, latents[0]) for latent in latents):
        sys.exit(f"{setting} at {case.pixels}: what is computed ahead gives another picture")
    return row | {f"{name}_s": statistics.median(values) for name, values in times.items()}


def _sample(model: Any, prompts: int) -> None:
    for _ in range(prompts):
        model.sample(_nothing)


def _nothing() -> None:
    pass


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak_gib(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else 0.0


def run(files: Files, cases: Sequence[Case], rounds: int, prompts: int, output: Path) -> dict[str, Any]:
    """Measure each case; the figures so far are in ``output`` after each."""
    from comfy_model import at_work
    from streamed import load

    with torch.inference_mode():
        patchers = {"before": load_as_before(files.nf4()), "ahead": load(files.nf4())}
        with at_work(patchers["before"].clone(), cases[0]) as model:
            model.sample(_nothing, 1)  # in ComfyUI 0.33 the first forward of a process rounds otherwise
        weights = patchers["ahead"].model.streaming.modulation.streamer.sizes()
        results: dict[str, Any] = {"modulation_bytes": sum(size.nbytes for size in weights), "rows": []}
        for setting in SETTINGS:
            for case in cases:
                results["rows"].append(measure(patchers, setting, case, rounds))
                (output / "modulation.json").write_text(json.dumps(results))
            one_step = min(cases, key=lambda case: (case.steps, case.pixels))
            results["rows"].append(measure(patchers, setting, one_step, 1, prompts))
            (output / "modulation.json").write_text(json.dumps(results))
    return results


def table(results: dict[str, Any]) -> str:
    lines = [
        "| blocks | picture | prompts x steps | bus GB/s | before s | ahead s | ratio | before GiB | ahead GiB |",
        "|---" * 9 + "|",
    ]
    for row in results["rows"]:
        bus = f"{row['bus_gbps']:.1f}" if row["bus_gbps"] else "as it is"
        lines.append(
            f"| {row['setting']} | {row['pixels']} | {row['prompts']} x {row['steps']} | {bus} | {row['before_s']:.3f} "
            f"| {row['ahead_s']:.3f} | {row['ahead_s'] / row['before_s']:.3f} | {row['before_gib']:.2f} "
            f"| {row['ahead_gib']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each model at each case")
    parser.add_argument("--prompts", type=int, default=200, help="samplings of one step, one after the other")
    given = parser.parse_args()
    begin(given)
    import_package()
    files = Files(given.folder, given.checkpoint, given.dry_run)
    files.enter()
    cases, prompts = (TINY_CASES, 3) if given.dry_run else (CASES, given.prompts)
    results = run(files, cases, given.rounds, prompts, given.output)
    print(f"{results['modulation_bytes'] / 1e9:.2f} GB of modulation weights\n{table(results)}")


if __name__ == "__main__":
    main()
