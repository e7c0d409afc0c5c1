"""A whole workflow, from the prompt to the picture, on a small card: load, CLIP-L and T5, sampling, VAE.

    COMFYUI_PATH=~/ComfyUI python benchmarks/workflow.py --cap 4 --output results

Run it with ComfyUI's Python. Every run begins with nothing on the device; runs with the card as it is and with the card
made small take turns. Without a checkpoint it makes an all-in-one file of full size with random weights (12.3 GB, kept
in ``--folder``). Prints a table of seconds a stage and writes ``workflow.json``.
"""

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from arguments import parse, parser_for
from inside_comfyui import import_package, require_gpu, use_allocator_of_comfyui
from memory import GIB, Use, Watch, capped
from timing import Clock

STAGES = ("encode", "sample", "decode")


class Stages:
    """Seconds of each stage of one run, on the host, each until the device is done."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[name] = time.perf_counter() - started


def checkpoint(folder: Path, *, is_small: bool) -> Path:
    path = folder / "flux-nf4-all-in-one.safetensors"
    if not path.exists():
        from make_checkpoint import Recipe, forget_weights, make_checkpoint

        device = "cuda" if torch.cuda.is_available() else "cpu"
        double, single, layers = (1, 1, 1) if is_small else (19, 38, 24)
        make_checkpoint(path, Recipe(double_blocks=double, single_blocks=single, t5_layers=layers, device=device))
        forget_weights()
        if device == "cuda":
            torch.cuda.empty_cache()
    return path


def run(model: Any, clip: Any, vae: Any, pixels: int, steps: int) -> tuple[dict[str, float], torch.Tensor]:
    """Seconds of each stage, ms of the steps after the first, and the picture, (1, pixels, pixels, 3)."""
    import comfy.sample

    stages = Stages()
    with stages.stage("encode"):
        positive = clip.encode_from_tokens_scheduled(clip.tokenize("a lighthouse in a storm, oil on canvas"))
    latent = torch.zeros(1, 16, pixels // 8, pixels // 8)
    noise = comfy.sample.prepare_noise(latent, 0)
    clock = Clock(model.load_device)
    with stages.stage("sample"):
        latent = comfy.sample.sample(
            model,
            noise,
            steps,
            1.0,
            "euler",
            "simple",
            positive,
            positive,
            latent,
            callback=lambda *_: clock.tick(),
            disable_pbar=True,
            seed=0,
        )
    with stages.stage("decode"):
        picture = vae.decode(latent)
    return stages.seconds | {"step_ms": statistics.median(clock.milliseconds())}, picture


def measure(parts: tuple[Any, Any, Any], cap_gib: float, pixels: int, steps: int) -> dict[str, Any]:
    """One run that begins with nothing on the device."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache(True)
    device = comfy.model_management.get_torch_device()
    with capped(device, cap_gib):
        with Watch(device, Use.at_rest(device), every_s=0.05) as watch:
            seconds, picture = run(*parts, pixels, steps)
        comfy.model_management.unload_all_models()
    return {"cap_gib": cap_gib, "peak_gib": watch.peak.device / GIB, "mean": float(picture.mean())} | seconds


def table(rows: list[dict[str, Any]]) -> str:
    stages = " | ".join(f"{stage} s" for stage in STAGES)
    lines = [f"| card | {stages} | of it a step, ms | peak VRAM GiB |", "|---" * 6 + "|"]
    for cap in dict.fromkeys(row["cap_gib"] for row in rows):
        runs = [row for row in rows if row["cap_gib"] == cap]
        times = [f"{statistics.median(run[stage] for run in runs):.2f}" for stage in STAGES]
        card = f"as small as {cap:g} GiB" if cap else "as it is"
        step = statistics.median(run["step_ms"] for run in runs)
        peak = max(run["peak_gib"] for run in runs)
        lines.append(f"| {card} | {' | '.join(times)} | {step:.1f} | {peak:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--cap", type=float, default=4.0, help="GiB of the small card")
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20, help="2 or more")
    parser.add_argument("--double", type=int, default=0, help="double blocks that stay")
    parser.add_argument("--single", type=int, default=0, help="single blocks that stay")
    parser.add_argument("--rounds", type=int, default=3)
    given = parse(parser)
    require_gpu()
    use_allocator_of_comfyui()
    import_package()
    from flux_nf4.loaded import load_all_in_one, streamed
    from flux_nf4.nf4_loader.catalogue import read_catalogue
    from flux_nf4.offload.comfyui.streaming import Residency

    with torch.inference_mode():
        path = given.checkpoint or checkpoint(given.folder, is_small=given.dry_run)
        started = time.perf_counter()
        loaded = load_all_in_one(read_catalogue(path))
        residency = Residency((("double", given.double), ("single", given.single)))
        parts = streamed(loaded.model, residency, None), loaded.clip, loaded.vae
        load_s = time.perf_counter() - started
        caps = (0.0,) if given.dry_run else (0.0, given.cap)
        pixels, steps = (64, 2) if given.dry_run else (given.pixels, given.steps)
        rows = [measure(parts, cap, pixels, steps) for _ in range(given.rounds) for cap in caps]
    (given.output / "workflow.json").write_text(json.dumps({"load_s": load_s, "rows": rows}, indent=1))
    print(f"loaded in {load_s:.1f} s; {pixels}x{pixels}, {steps} steps\n{table(rows)}")


if __name__ == "__main__":
    main()
