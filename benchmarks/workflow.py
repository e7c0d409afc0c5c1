"""A whole workflow, from the prompt to the picture, on a small card: load, CLIP-L and T5, sampling, VAE.

    COMFYUI_PATH=~/ComfyUI python benchmarks/workflow.py --caps 4 6 8

Run it with ComfyUI's Python. The card as it is and made small take turns. In each, one prompt begins with nothing on
the device, another one follows it, and the first comes again after a prompt of another model: a dense Flux of a few
blocks (2.6 GB), in ComfyUI's own hands. Without a checkpoint it makes an all-in-one file of full size with random
weights (12.3 GB), kept in ``--folder`` as the other model is. Prints a table of seconds a stage and writes
``workflow.json``, with what loading and one prompt added to the memory of the process (``ram_gib``), before the other
model came. Latents must be bit-equal to those that the card as it is makes of the same prompt. Pictures may be a
rounding of bf16 (0.008) away, on the card as it is, too: cuDNN chooses how to convolve by the memory that is free.
Where ComfyUI finds no room to decode at once it decodes in tiles: such a run is compared with the card as it is
decoding in tiles, with the VAE there already; the trial to decode at once, and T5's way out before it, count against
the small card.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import needs_torch  # noqa: F401
import orderly
import torch
from arguments import begin, parser_for, positive
from inside_comfyui import import_package, use_allocator_of_comfyui
from memory import GIB, Use, Watch, capped, resident_bytes
from timing import Clock

STAGES = ("encode", "sample", "decode")
TEXTS = ("a lighthouse in a storm, oil on canvas", "a quiet harbour at dawn, seen from the hill above the town")


@dataclass(frozen=True)
class Parts:
    """Models in host memory."""

    model: Any
    clip: Any
    vae: Any
    other: Any
    device: torch.device


class Stages:
    """Of each stage of one run: seconds on the host until the device is done, and GiB in use at most."""

    def __init__(self, device: torch.device, before: Use) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_gib: dict[str, float] = {}
        self._device, self._before = device, before

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        with Watch(self._device, self._before, every_s=0.02) as watch:
            started = time.perf_counter()
            yield
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.seconds[name] = time.perf_counter() - started
        self.peak_gib[name] = watch.peak.device / GIB


def checkpoint(folder: Path, *, is_small: bool) -> Path:
    """An all-in-one NF4 file."""
    double, single, layers = (1, 1, 1) if is_small else (19, 38, 24)
    path = folder / "flux-nf4-all-in-one.safetensors"
    return made(path, double_blocks=double, single_blocks=single, t5_layers=layers)


def other_model(folder: Path, *, is_small: bool) -> Path:
    """A dense transformer."""
    double, single = (1, 1) if is_small else (2, 4)
    path = folder / "flux-other-bf16.safetensors"
    return made(path, is_dense=True, double_blocks=double, single_blocks=single, unet_only=True)


def made(path: Path, *, is_dense: bool = False, **recipe: Any) -> Path:
    if path.exists():
        return path
    from make_checkpoint import Recipe, forget_weights, make_checkpoint, make_twin

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if is_dense:
        make_twin(path, Recipe(device=device, **recipe), torch.bfloat16)
    else:
        make_checkpoint(path, Recipe(device=device, **recipe))
    forget_weights()
    if device == "cuda":
        torch.cuda.empty_cache()
    return path


def sample(model: Any, positive: Any, pixels: int, steps: int, on_step: Callable[..., None]) -> torch.Tensor:
    import comfy.sample

    latent = torch.zeros(1, 16, pixels // 8, pixels // 8)
    noise = comfy.sample.prepare_noise(latent, 0)
    how = {"steps": steps, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    given = {"positive": positive, "negative": positive, "latent_image": latent, "seed": 0}
    return comfy.sample.sample(model, noise, **how, **given, callback=on_step, disable_pbar=True)


def prompt(parts: Parts, before: Use, pixels: int, steps: int, text: str = TEXTS[0]) -> tuple[dict[str, Any], Any]:
    """Seconds of each stage and before the first step, ms of a step, GiB in use at most, latent and picture; and
    what the text became."""
    stages, clock = Stages(parts.device, before), Clock(parts.device)
    with stages.stage("encode"):
        tokens = parts.clip.tokenize(text)
        positive = parts.clip.encode_from_tokens_scheduled(tokens)
    with stages.stage("sample"):
        latent = sample(parts.model, positive, pixels, steps, lambda *_: clock.tick())
    with stages.stage("decode"):
        picture = parts.vae.decode(latent)
    steps_ms = clock.milliseconds()
    step_ms = statistics.median(steps_ms)
    start_s = stages.seconds["sample"] - (sum(steps_ms) + step_ms) / 1000
    row = stages.seconds | {"start_s": start_s, "step_ms": step_ms, "peak_gib": stages.peak_gib}
    return row | {"latent": latent, "picture": picture}, positive


def decode_in_tiles(parts: Parts, latent: torch.Tensor) -> dict[str, Any]:
    """What ComfyUI falls back to where there is no room to decode at once: seconds and picture."""
    started = time.perf_counter()
    picture = parts.vae.decode_tiled(latent)
    return {"tiles": time.perf_counter() - started, "picture_of_tiles": picture}


def measure(parts: Parts, cap_gib: float, pixels: int, steps: int) -> list[dict[str, Any]]:
    """The prompt with nothing on the device, a new one after it, and the first again after the other model."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache(True)
    with capped(parts.device, cap_gib):
        before = Use.at_rest(parts.device)
        first, positive = prompt(parts, before, pixels, steps)
        new, _ = prompt(parts, before, pixels, steps, TEXTS[1])
        tiles, new_tiles = ({} if cap_gib else decode_in_tiles(parts, run["latent"]) for run in (first, new))
        sample(parts.other, positive, pixels, 2, lambda *_: None)
        again, _ = prompt(parts, before, pixels, steps)
        comfy.model_management.unload_all_models()
    runs = {"nothing": first | tiles, "itself": new | new_tiles, "another model": again | tiles}
    return [{"pixels": pixels, "cap_gib": cap_gib, "after": after, **run} for after, run in runs.items()]


def measure_size(parts: Parts, caps: Sequence[float], pixels: int, steps: int, rounds: int) -> list[dict[str, Any]]:
    measure(parts, 0.0, pixels, 2)  # for kernels to be loaded
    rows: list[dict[str, Any]] = []
    for _ in range(rounds):
        for cap in caps:
            rows += measure(parts, cap, pixels, steps)
            for row in rows[-3:]:
                seconds = ", ".join(f"{stage} {row[stage]:.2f} s" for stage in STAGES)
                print(f"{pixels}x{pixels}, {cap:g} GiB, after {row['after']}: {seconds}", flush=True)
    compare(rows)
    return rows


def compare(rows: list[dict[str, Any]]) -> None:
    """Put how far latents and pictures are from the first ones of their prompt in their place, and whether tiles made
    the picture."""
    names = ("latent", "picture", "picture_of_tiles")
    firsts = {row["after"]: tuple(row.get(name) for name in names) for row in reversed(rows) if not row["cap_gib"]}
    for row in rows:
        latent, picture, tiles = firsts["itself" if row["after"] == "itself" else "nothing"]
        row.pop("picture_of_tiles", None)
        off, off_tiles = (float((row["picture"] - expected).abs().max()) for expected in (picture, tiles))
        row["is_tiled"] = off_tiles < off
        row["picture"] = min(off, off_tiles)
        row["latent"] = float((row["latent"] - latent).abs().max())


def table(rows: list[dict[str, Any]]) -> str:
    stages = " | ".join(f"{stage} s" for stage in STAGES)
    lines = [
        f"| card | after | {stages} | of it start s | a step, ms | sample + decode | GiB at most | off by | in tiles |",
        "|---" * 11 + "|",
    ]
    expected: dict[tuple[str, bool], float] = {}
    for after in dict.fromkeys(row["after"] for row in rows):
        runs = [row for row in rows if row["after"] == after and not row["cap_gib"]]
        sample, decode, tiles = (statistics.median(run[name] for run in runs) for name in ("sample", "decode", "tiles"))
        expected |= {(after, False): sample + decode, (after, True): sample + tiles}
    for cap, after in dict.fromkeys((row["cap_gib"], row["after"]) for row in rows):
        runs = [row for row in rows if (row["cap_gib"], row["after"]) == (cap, after)]
        times = " | ".join(f"{statistics.median(run[stage] for run in runs):.2f}" for stage in STAGES)
        ratio = statistics.median((run["sample"] + run["decode"]) / expected[after, run["is_tiled"]] for run in runs)
        card = f"as small as {cap:g} GiB" if cap else "as it is"
        start, step = (statistics.median(run[name] for run in runs) for name in ("start_s", "step_ms"))
        latent, picture = (max(run[name] for run in runs) for name in ("latent", "picture"))
        peaks = ", ".join(f"{max(run['peak_gib'][stage] for run in runs):.2f}" for stage in STAGES)
        tiled = f"{sum(run['is_tiled'] for run in runs)} of {len(runs)}"
        figures = f"{times} | {start:.2f} | {step:.1f} | {ratio:.2f} | {peaks} | {latent:g}, {picture:.1g} | {tiled}"
        lines.append(f"| {card} | {after} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--caps", type=float, nargs="+", default=[4.0], help="GiB of the small cards")
    parser.add_argument("--pixels", type=positive, nargs="+", default=[1024], help="picture sizes")
    parser.add_argument("--steps", type=positive, default=20, help="2 or more")
    parser.add_argument("--double", type=int, default=0, help="double blocks that stay")
    parser.add_argument("--single", type=int, default=0, help="single blocks that stay")
    parser.add_argument("--rounds", type=positive, default=3, help="turns of each card")
    given = parser.parse_args()
    use_allocator_of_comfyui()
    begin(given)
    import_package()
    import comfy.model_management
    import comfy.sd

    from flux_nf4.checkpoints import load_all_in_one, streamed
    from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue
    from flux_nf4.offload.plan import Residency

    with torch.inference_mode():
        path = given.checkpoint or checkpoint(given.folder, is_small=given.dry_run)
        other = other_model(given.folder, is_small=given.dry_run)
        started, ram_before = time.perf_counter(), resident_bytes()
        loaded = load_all_in_one(read_catalogue(path))
        residency = Residency((("double", given.double), ("single", given.single)))
        model = streamed(loaded.model, residency, None)
        load_s = time.perf_counter() - started
        device = comfy.model_management.get_torch_device()
        caps = (0.0,) if given.dry_run else (0.0, *given.caps)
        sizes, steps = ((64,), 2) if given.dry_run else (given.pixels, given.steps)
        parts = Parts(model, loaded.clip, loaded.vae, None, device)
        prompt(parts, Use.at_rest(device), sizes[0], 2)
        ram_gib = (resident_bytes() - ram_before) / GIB
        parts = dataclasses.replace(parts, other=comfy.sd.load_diffusion_model(str(other)))
        print(f"loaded in {load_s:.1f} s; {steps} steps; {ram_gib:.1f} GiB of RAM")
        rows: list[dict[str, Any]] = []
        for pixels in sizes:
            measured = measure_size(parts, caps, pixels, steps, given.rounds)
            rows += measured
            print(f"{pixels}x{pixels}\n{table(measured)}", flush=True)
            results = {"load_s": load_s, "ram_gib": ram_gib, "rows": rows}
            (given.output / "workflow.json").write_text(json.dumps(results, indent=1))
    if any(row["latent"] for row in rows):
        raise SystemExit("a small card sampled another latent")


if __name__ == "__main__":
    orderly.run(main)
