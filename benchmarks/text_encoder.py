"""What streaming costs a text encoder, and what a second prompt costs the transformer beside it: Mistral 3 and FLUX.2.

    COMFYUI_PATH=~/ComfyUI python benchmarks/text_encoder.py

Run it with ComfyUI's Python. It makes files of full size with random weights (Mistral 3: 10.7 GB, FLUX.2-dev: 18 GB,
kept in ``--folder``). First a prompt of 512 tokens is encoded within each budget and with all of it resident, in turns:
the bits must be equal. Then two prompts, each encoded and sampled, run on a card made as small as ``--cap`` with both
models on automatic: the second must move no resident block of the transformer, and no forward of either may run out of
memory. Prints how long each part took, what stayed and what moved, and writes ``text_encoder.json``. Fails where bits
differ, a ratio is above ``--most``, a block has moved, or memory ran out.
"""

import functools
import json
import statistics
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import needs_torch  # noqa: F401
import orderly
import torch
from arguments import begin, parser_for, positive
from encoder_files import flux2, mistral3, tekken, write_random
from inside_comfyui import import_package, use_allocator_of_comfyui
from memory import capped
from timing import seconds

GIB = 2**30
FULL = {"layers": 30, "heads": 32, "kv_heads": 8, "intermediate": 32768, "vocabulary": 131072}
TINY = {"layers": 30, "heads": 2, "kv_heads": 1, "intermediate": 64, "vocabulary": 320}
KEY = "mistral3_24b"


def tokens(count: int, vocabulary: int, seed: int) -> dict[str, Any]:
    """A prompt of so many tokens."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(20, vocabulary, (count,), generator=generator).tolist()
    return {KEY: [[(number, 1.0) for number in numbers]]}


def write_encoder(folder: Path, sizes: dict[str, int]) -> Path:
    """A Mistral 3 of these sizes, with its tokenizer."""
    path = write_random(folder / "mistral3" / "mistral3-nf4.safetensors", mistral3(**sizes))
    (path.parent / "tekken.json").write_bytes(tekken())
    return path


def load_encoder(path: Path) -> Any:
    """Its CLIP."""
    from flux_nf4.encoders import load_encoders
    from flux_nf4.nf4_loader.checkpoint.encoder_file import read_encoder_file

    return load_encoders([read_encoder_file(path)], "flux2")


def is_known() -> bool:
    """Whether this ComfyUI knows Mistral 3."""
    import comfy.text_encoders.llama as llama

    return hasattr(llama, "Mistral3Small24BConfig")


def shrink_comfyui() -> None:
    """ComfyUI's Mistral 3 is as small as `TINY`."""
    import comfy.text_encoders.llama as llama

    real = llama.Mistral3Small24BConfig
    small = {"num_attention_heads": TINY["heads"], "num_key_value_heads": TINY["kv_heads"]}
    small |= {"intermediate_size": TINY["intermediate"], "vocab_size": TINY["vocabulary"]}
    llama.Mistral3Small24BConfig = functools.partial(real, **small)


def measure_budgets(
    loaded: Any, budgets: Sequence[float], prompt: dict[str, Any], rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """Of each budget in GiB (0 is all resident): seconds of an encoding, peak and bytes over the bus."""
    from flux_nf4.encoders import streamed_clip
    from flux_nf4.offload.plan import Residency

    times: dict[float, list[float]] = {budget: [] for budget in budgets}
    rows: dict[float, dict[str, Any]] = {}
    expected = None
    for _ in range(rounds):
        for budget in budgets:
            clip = streamed_clip(loaded, Residency(budget_bytes=int(budget * GIB) or None), None)
            clip.encode_from_tokens(prompt)  # loads it; and the first of a process may round otherwise
            encoded = clip.encode_from_tokens(prompt).clone()
            expected = encoded if expected is None else expected
            if not torch.equal(encoded, expected):
                raise SystemExit(f"within {budget:g} GiB the embeddings differ")
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            times[budget] += [seconds(functools.partial(clip.encode_from_tokens, prompt), device) for _ in range(3)]
            plan = clip.patcher.model.streaming.streamer.plan
            rows[budget] = {
                "budget_gib": budget,
                "resident": len(plan.resident) if plan else 0,
                "streamed": len(plan.streamed) if plan else 0,
                "bus_gb": plan.bytes_per_forward / 1e9 if plan else 0.0,
                "held_gib": clip.patcher.loaded_size() / GIB,
                "peak_gib": torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else 0.0,
            }
    for budget, row in rows.items():
        row["s"] = statistics.median(times[budget])
        row["ratio"] = row["s"] / statistics.median(times[budgets[0]])
    return list(rows.values())


Copies = dict[int, list[Any]]
"""Weak references to the copies that each resident block has on the device, by its index."""


def copies_on_device(model: Any) -> Copies:
    """Of the resident blocks of ``model`` now."""
    blocks = model.model.streaming.streamer.blocks
    records = {i: (block.own, block.mapped) for i, block in enumerate(blocks) if block.is_resident}
    return {
        i: [weakref.ref(record.buffer) for record in of if record is not None and record.buffer is not None]
        for i, of in records.items()
    }


def two_prompts(clip: Any, model: Any, vocabulary: int, pixels: int, steps: int, count: int) -> dict[str, Any]:
    """What of the transformer is resident after the first picture, after the second prompt, and after its picture."""
    import comfy.sample

    device = clip.patcher.load_device
    found: dict[str, Any] = {}
    for number in (1, 2):
        prompt = tokens(count, vocabulary, number)
        found[f"encode_{number}_s"] = seconds(functools.partial(clip.encode_from_tokens, prompt), device)
        found[f"held_by_encoder_{number}_gib"] = clip.patcher.loaded_size() / GIB
        found[f"layers_of_encoder_{number}"] = copies_on_device(clip.patcher)
        found[f"after_prompt_{number}"] = copies_on_device(model)
        positive = clip.encode_from_tokens_scheduled(prompt)
        latent = torch.zeros(1, 128, pixels // 16, pixels // 16)
        noise = comfy.sample.prepare_noise(latent, number)
        how = (steps, 1.0, "euler", "simple", positive, positive, latent)
        call = functools.partial(comfy.sample.sample, model, noise, *how, disable_pbar=True, seed=number)
        found[f"sample_{number}_s"] = seconds(call, device)
        found[f"after_picture_{number}"] = copies_on_device(model)
    return found


def ran_out_of_memory(clip: Any, model: Any) -> list[str]:
    """What the log has said of forwards that ran out of memory."""
    said = [text for patcher in (clip.patcher, model) for text in patcher.model.streaming.said]
    return [text for text in said if "out of memory" in text]


def moved(found: dict[str, Any]) -> int:
    """How many blocks that were resident after the first picture were given up or copied anew by the second prompt."""
    before, after = found["after_picture_1"], found["after_prompt_2"]
    return sum(
        any(copy() is None for copy in copies) or len(after.get(index, ())) != len(copies)
        for index, copies in before.items()
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| budget | s | against resident | layers that stay, streamed | held GiB | peak GiB | GB over the bus |"]
    lines.append("|---" * 7 + "|")
    for row in rows:
        budget = f"{row['budget_gib']:g} GiB" if row["budget_gib"] else "all resident"
        layers = f"{row['resident']}, {row['streamed']}"
        memory = f"{row['held_gib']:.2f} | {row['peak_gib']:.2f} | {row['bus_gb']:.2f}"
        lines.append(f"| {budget} | {row['s']:.3f} | {row['ratio']:.3f} | {layers} | {memory} |")
    return "\n".join(lines)


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.0], help="GiB")
    parser.add_argument("--tokens", type=int, default=512, help="of a prompt")
    parser.add_argument("--rounds", type=positive, default=3, help="turns of each budget")
    parser.add_argument("--cap", type=float, default=8.0, help="GiB of the small card; 0 leaves the workflow out")
    parser.add_argument("--pixels", type=positive, default=1024, help="picture size")
    parser.add_argument("--steps", type=positive, default=2, help="of a sampling")
    parser.add_argument("--most", type=float, default=1.15, help="a ratio above it fails")
    given = parser.parse_args()
    use_allocator_of_comfyui()
    begin(given)
    import_package()
    import comfy.model_management
    from streamed import load

    device = comfy.model_management.get_torch_device()
    sizes = TINY if given.dry_run else FULL
    if given.dry_run:
        shrink_comfyui()
        given.pixels, given.tokens, given.budgets = 64, 16, [0.5]
    shapes = flux2(hidden=256, double=1, single=2) if given.dry_run else flux2(hidden=6144, double=8, single=48)
    said = Phases()
    encoder = write_encoder(given.folder, sizes)
    transformer = write_random(given.folder / "flux2-nf4.safetensors", shapes) if given.cap else None
    said.end_of("the files")
    with torch.inference_mode():
        loaded = load_encoder(encoder)
        said.end_of("loading the text encoder")
        prompt = tokens(given.tokens, sizes["vocabulary"], 0)
        rows = measure_budgets(loaded, [0.0, *given.budgets], prompt, 1 if given.dry_run else given.rounds, device)
        said.end_of("encoding")
        print(table(rows), flush=True)
        results: dict[str, Any] = {"rows": rows}
        (given.output / "text_encoder.json").write_text(json.dumps(results, indent=1))
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache(True)
        if transformer is not None:
            model = load(transformer)
            said.end_of("loading the transformer")
            clip = loaded.clone()
            with capped(device, 0.0 if given.dry_run else given.cap):
                found = two_prompts(clip, model, sizes["vocabulary"], given.pixels, given.steps, given.tokens)
            said.end_of("two prompts")
            counted = {name: len(value) if isinstance(value, dict) else value for name, value in found.items()}
            results["workflow"] = counted | {"moved": moved(found), "cap_gib": given.cap}
            results["workflow"]["ran_out_of_memory"] = ran_out_of_memory(clip, model)
            print(told(results["workflow"]), flush=True)
    (given.output / "text_encoder.json").write_text(json.dumps(results, indent=1))
    problems = [f"{row['budget_gib']:g} GiB take {row['ratio']:.2f}" for row in rows if row["ratio"] > given.most]
    if problems and not given.dry_run:
        raise SystemExit(f"of what encoding takes with all resident: {', '.join(problems)} (wanted: {given.most:g})")
    if transformer is not None and results["workflow"]["moved"]:
        raise SystemExit("the second prompt moved resident blocks of the transformer")
    if transformer is not None and results["workflow"]["ran_out_of_memory"]:
        raise SystemExit("\n".join(results["workflow"]["ran_out_of_memory"]))


class Phases:
    """Prints how long each part of the run took."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def end_of(self, phase: str) -> None:
        now = time.perf_counter()
        print(f"{phase}: {now - self._since:.1f} s", flush=True)
        self._since = now


def told(workflow: dict[str, Any]) -> str:
    """What `two_prompts` found, in words."""
    lines = []
    for number in (1, 2):
        seconds_of = [workflow[f"{part}_{number}_s"] for part in ("encode", "sample")]
        blocks = [workflow[f"after_{part}_{number}"] for part in ("prompt", "picture")]
        lines.append(
            f"prompt {number}: encoded in {seconds_of[0]:.2f} s, sampled in {seconds_of[1]:.2f} s; "
            f"held by the text encoder: {workflow[f'held_by_encoder_{number}_gib']:.2f} GiB with "
            f"{workflow[f'layers_of_encoder_{number}']} resident layers; resident blocks of the transformer: "
            f"{blocks[0]} after the prompt, {blocks[1]} after the picture"
        )
    moved_blocks = f"{workflow['moved']} of {workflow['after_picture_1']} resident blocks"
    return "\n".join([*lines, f"the second prompt moved {moved_blocks} of the transformer (wanted: none)"])


if __name__ == "__main__":
    orderly.run(main)
