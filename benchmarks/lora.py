"""What LoRA costs: a full-size NF4 Flux on the GPU with LoRA of several ranks, streamed and resident.

    COMFYUI_PATH=~/ComfyUI python benchmarks/lora.py
    COMFYUI_PATH=~/ComfyUI python benchmarks/lora.py --checkpoint flux1-dev-bnb-nf4-v2.safetensors

Run it with ComfyUI's Python; every variant runs in the same process, and each number is a median. The LoRA are of
every Linear in the blocks, in the layouts of kohya and of diffusers (q, k, v and the MLP on their own). "first" is the
best of three first forwards after another strength, with loading the model, as a sampler does; "patches" is what comes
before that: ComfyUI's LoRA node, with the file in memory.
"""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import needs_torch  # noqa: F401
import orderly
import torch
from arguments import begin, parser_for, pattern, positive
from cases import Case
from inside_comfyui import import_package, use_allocator_of_comfyui
from random_lora import LoRA, diffusers, kohya, linear_shapes
from timing import milliseconds
from weights import Files

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


def lora_file(layout: str, rank: int, seed: int, model: Any) -> LoRA:
    from comfy_model import in_bf16

    shapes, config = linear_shapes(model), model.model_config.unet_config
    made = kohya(shapes, rank, seed=str(seed)) if layout == "kohya" else diffusers(config, shapes, rank, str(seed))
    return in_bf16(made)


def patched(patcher: Any, files: Sequence[LoRA], strength: float, case: Case) -> Any:
    """The model at work on ``case``, with these LoRA."""
    from comfy_model import ComfyModel, with_lora

    for file in files:
        patcher = with_lora(patcher, file, strength)
    return ComfyModel(patcher, case)


def first_forward(patcher: Any, files: Sequence[LoRA], strength: float, case: Case) -> tuple[float, float]:
    """ms of adding the patches, and of loading the model and the first forward."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    model = patched(patcher, files, strength, case)
    there = time.perf_counter()
    model.load()
    model.forward()
    torch.cuda.synchronize()
    return 1000 * (there - started), 1000 * (time.perf_counter() - there)


def measure(
    path: Path, loras: Mapping[str, Any], sizes: Sequence[int], rounds: int, repeats: int
) -> list[dict[str, Any]]:
    from streamed import load, with_residency

    patcher = load(path)
    rows: dict[tuple[int, str, str], dict[str, Any]] = {}
    times: dict[tuple[int, str, str], list[float]] = {}
    for name, parts in loras.items():
        files = [lora_file(layout, rank, index, patcher.model) for index, (layout, rank) in enumerate(parts)]
        for plan, (double, single) in PLANS.items():
            clone = with_residency(patcher, double, single)
            for pixels in sizes:
                case, key = Case("", pixels), (pixels, plan, name)
                row = rows[key] = {"pixels": pixels, "plan": plan, "lora": name}
                row["load_s"] = sum(first_forward(clone, files, 0.5, case)) / 1000
                again = [first_forward(clone, files, 0.6 + 0.1 * i, case) for i in range(3)]
                row["patches_ms"], row["first_ms"] = map(min, zip(*again, strict=True))
                times[key] = []
                for _ in range(rounds):
                    model = patched(clone, files, 0.7, case)
                    model.load()
                    times[key] += milliseconds(model.forward, repeats)[1:]
                row["ms"] = statistics.median(times[key])
                row["ratio"] = row["ms"] / rows[pixels, plan, "none"]["ms"]
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
    parser = parser_for(__doc__, can_be_dry=False)
    parser.add_argument("--only", type=pattern, default="", help="the LoRAs to run beside none: a regular expression")
    parser.add_argument("--pixels", type=positive, nargs="+", default=[1024, 512], help="picture sizes")
    parser.add_argument("--rounds", type=positive, default=3, help="turns of each LoRA")
    parser.add_argument("--repeats", type=positive, default=8, help="timed forwards of a turn")
    given = parser.parse_args()
    chosen = {name: loras for name, loras in LORAS.items() if not loras or given.only.search(name)}
    use_allocator_of_comfyui()
    begin(given)
    import_package()
    with torch.inference_mode():
        path = Files(given.folder, given.checkpoint).nf4()
        rows = measure(path, chosen, given.pixels, given.rounds, given.repeats)
    (given.output / "lora.json").write_text(json.dumps(rows, indent=1))
    print(torch.cuda.get_device_name())
    print(table(rows))


if __name__ == "__main__":
    orderly.run(main)
