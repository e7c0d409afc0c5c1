"""What LoRA costs: a full-size NF4 Flux on the GPU with LoRA of several ranks, streamed and resident.

    COMFYUI_PATH=~/ComfyUI python benchmarks/lora.py --output results
    COMFYUI_PATH=~/ComfyUI python benchmarks/lora.py --checkpoint flux1-dev-bnb-nf4-v2.safetensors --output results

Run it with ComfyUI's Python; every variant runs in the same process, and each number is a median. The LoRA are of
every Linear in the blocks, in the layouts of kohya and of diffusers (q, k, v and the MLP on their own). "first" is the
best of three first forwards after another strength, with loading the model, as a sampler does; "patches" is what comes
before that: ComfyUI's LoRA node, with the file in memory.
"""

import argparse
import functools
import json
import re
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from arguments import ROOT
from inside_comfyui import import_package, require_gpu
from streaming import Forward, checkpoint_file
from timing import milliseconds

LORAS = {
    "none": (),
    "rank 16": (("kohya", 16),),
    "rank 16, q k v apart": (("diffusers", 16),),
    "rank 128": (("kohya", 128),),
    "4 of rank 32": (("kohya", 32),) * 4,
    "16 of rank 16": (("kohya", 16),) * 16,
}
"""Layout and rank of each LoRA."""

PLANS = {"all resident": (19, 38), "0/0": (0, 0)}
"""Double and single blocks that stay."""


def lora_file(layout: str, rank: int, seed: int, model: Any) -> Mapping[str, torch.Tensor]:
    import loras  # type: ignore[import-not-found]

    shapes = loras.linear_shapes(model)
    if layout == "kohya":
        file = loras.kohya(shapes, rank, seed=str(seed))
    else:
        file = loras.diffusers(model.model_config.unet_config, shapes, rank)
    return {name: tensor.bfloat16() if tensor.dim() == 2 else tensor for name, tensor in file.items()}


def patched(patcher: Any, files: tuple[Mapping[str, torch.Tensor], ...], strength: float) -> Any:
    import comfy.sd

    for file in files:
        patcher, _ = comfy.sd.load_lora_for_models(patcher, None, file, strength, 0)
    return patcher


def first_forward(patcher: Any, files: Any, strength: float, forward: Forward) -> tuple[float, float]:
    """ms of adding the patches, and of loading the model and the first forward."""
    import comfy.model_management

    torch.cuda.synchronize()
    started = time.perf_counter()
    other = patched(patcher, files, strength)
    there = time.perf_counter()
    comfy.model_management.load_models_gpu([other])
    forward(other.model)
    torch.cuda.synchronize()
    return 1000 * (there - started), 1000 * (time.perf_counter() - there)


def measure(
    path: Path, loras: Mapping[str, Any], sizes: Sequence[int], rounds: int, repeats: int
) -> list[dict[str, Any]]:
    import comfy.model_management
    from streamed import load, with_residency

    patcher = load(path)
    device = comfy.model_management.get_torch_device()
    forwards = [Forward(pixels, device, patcher.model.get_dtype()) for pixels in sizes]
    rows: dict[tuple[int, str, str], dict[str, Any]] = {}
    times: dict[tuple[int, str, str], list[float]] = {}
    for name, parts in loras.items():
        files = tuple(lora_file(layout, rank, index, patcher.model) for index, (layout, rank) in enumerate(parts))
        for plan, (double, single) in PLANS.items():
            clone = with_residency(patcher, double, single)
            for forward in forwards:
                key = forward.pixels, plan, name
                row = rows[key] = {"pixels": forward.pixels, "plan": plan, "lora": name}
                row["load_s"] = sum(first_forward(clone, files, 0.5, forward)) / 1000
                again = [first_forward(clone, files, 0.6 + 0.1 * i, forward) for i in range(3)]
                row["patches_ms"], row["first_ms"] = map(min, zip(*again, strict=True))
                times[key] = []
                for _ in range(rounds):
                    comfy.model_management.load_models_gpu([patched(clone, files, 0.7)])
                    times[key] += milliseconds(functools.partial(forward, clone.model), repeats)[1:]
                row["ms"] = statistics.median(times[key])
                row["ratio"] = row["ms"] / rows[forward.pixels, plan, "none"]["ms"]
    return list(rows.values())


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| picture | plan | LoRA | ms | against none | first, ms | patches, ms | first load, s |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        first = f"{row['first_ms']:.0f} | {row['patches_ms']:.0f} | {row['load_s']:.2f}"
        figures = f"{row['ms']:.1f} | {row['ratio']:.3f} | {first}"
        lines.append(f"| {row['pixels']} | {row['plan']} | {row['lora']} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="an NF4 file; made if not given")
    parser.add_argument("--output", type=Path, default=Path(), help="folder for the JSON")
    parser.add_argument("--only", default="", help="a regular expression: the LoRAs to run beside none, by name")
    parser.add_argument("--pixels", type=int, nargs="+", default=[1024, 512], help="picture sizes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=8)
    given = parser.parse_args()
    chosen = {name: loras for name, loras in LORAS.items() if not loras or re.search(given.only, name)}
    require_gpu()
    import_package()
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    with checkpoint_file(given.checkpoint) as path, torch.inference_mode():
        rows = measure(path, chosen, given.pixels, given.rounds, given.repeats)
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "lora.json").write_text(json.dumps(rows, indent=1))
    print(torch.cuda.get_device_name())
    print(table(rows))


if __name__ == "__main__":
    main()
