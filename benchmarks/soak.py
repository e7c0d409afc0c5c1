"""Many prompts in one process, each other than the one before: does anything grow, is any picture another one?

    COMFYUI_PATH=~/ComfyUI python benchmarks/soak.py
    COMFYUI_PATH=~/ComfyUI python benchmarks/soak.py --checkpoint flux1-dev-bnb-nf4-v2.safetensors --prompts 200

Run it with ComfyUI's Python. Prompts are drawn at random, with a fixed seed: size of the picture, LoRAs, blocks that
stay, and now and then all models unloaded before it, as ComfyUI's button does. It fails if a picture is not bit-equal
to the first one of its size and LoRAs, whatever blocks stayed, or if memory grew: of the device, pinned, or of the
host. Writes ``soak.json``.
"""

import dataclasses
import gc
import hashlib
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import needs_torch  # noqa: F401
import torch
from arguments import begin, parser_for
from cases import Case
from inside_comfyui import import_package
from memory import Use, resident_bytes
from weights import TINY_BLOCKS, Files

MIB = 2**20
SLACK_BYTES = {"device": 64 * MIB, "allocated": MIB, "pinned": 0, "resident": 64 * MIB}
"""What each may be higher at most in the second half than in the first: allocators round, kernels load late."""


@dataclass(frozen=True)
class Prompt:
    pixels: int
    loras: int
    double: int
    single: int
    unloads_first: bool

    def __str__(self) -> str:
        unloaded = ", all unloaded before" if self.unloads_first else ""
        return f"{self.pixels}x{self.pixels}, {self.loras} LoRAs, {self.double}/{self.single} blocks stay{unloaded}"


@dataclass(frozen=True)
class Memory:
    """Bytes in use after a prompt."""

    device: int
    allocated: int
    pinned: int
    resident: int


@dataclass(frozen=True)
class Done:
    prompt: Prompt
    digest: str
    seconds: float
    memory: Memory

    def __str__(self) -> str:
        memory = ", ".join(f"{kind} {nbytes / MIB:.0f}" for kind, nbytes in dataclasses.asdict(self.memory).items())
        return f"{self.prompt}: {self.seconds:.2f} s; MiB in use: {memory}"


def prompts(count: int, *, is_tiny: bool) -> list[Prompt]:
    draw = random.Random(0)
    sizes = (64, 96) if is_tiny else (512, 768, 1024)
    depths = (*((n, n) for n in range(2)), TINY_BLOCKS) if is_tiny else ((0, 0), (7, 7), (12, 24), (3, 0), (19, 38))
    drawn = []
    for _ in range(count):
        pixels, loras, counts = draw.choice(sizes), draw.choice((0, 0, 1, 2)), draw.choice(depths)
        drawn.append(Prompt(pixels, loras, *counts, unloads_first=draw.random() < 0.1))
    return drawn


def run(patcher: Any, prompt: Prompt, steps: int, text_tokens: int) -> Done:
    import comfy.model_management
    from comfy_model import ComfyModel
    from streamed import with_residency

    if prompt.unloads_first:
        comfy.model_management.unload_all_models()
    case = Case("", prompt.pixels, steps=steps, loras=prompt.loras, rank=16, text_tokens=text_tokens)
    started = time.perf_counter()
    picture = ComfyModel(with_residency(patcher, prompt.double, prompt.single), case).sample(lambda: None)
    seconds = time.perf_counter() - started
    digest = hashlib.sha256(picture.float().numpy().tobytes()).hexdigest()
    gc.collect()
    return Done(prompt, digest, seconds, memory_of(patcher))


def memory_of(patcher: Any) -> Memory:
    use = Use.now(patcher.load_device)
    return Memory(use.device, use.allocated, patcher.model.streaming.streamer.pinned_bytes, resident_bytes())


def other_pictures(done: Sequence[Done]) -> list[int]:
    """Indices of prompts whose picture is not the first one of their size and LoRAs."""
    first: dict[tuple[int, int], str] = {}
    return [
        index
        for index, one in enumerate(done)
        if first.setdefault((one.prompt.pixels, one.prompt.loras), one.digest) != one.digest
    ]


def growth(done: Sequence[Done]) -> dict[str, int]:
    """By how many bytes the highest use in the second half is above that in the first, for each kind of memory."""
    half = len(done) // 2

    def most(part: Sequence[Done], kind: str) -> int:
        return max(getattr(one.memory, kind) for one in part)

    return {kind: most(done[half:], kind) - most(done[:half], kind) for kind in SLACK_BYTES}


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--prompts", type=int, default=200, help="how many")
    parser.add_argument("--steps", type=int, default=4, help="of each")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin no prompt after this time")
    given = parser.parse_args()
    begin(given)
    until = time.monotonic() + 60 * given.minutes
    import_package()
    from streamed import load

    files = Files(given.folder, given.checkpoint, given.dry_run)
    files.enter()
    done: list[Done] = []
    with torch.inference_mode():
        patcher = load(files.nf4())
        for prompt in prompts(given.prompts, is_tiny=given.dry_run):
            if time.monotonic() < until:
                done.append(run(patcher, prompt, given.steps, text_tokens=8 if given.dry_run else 512))
                print(f"{len(done)}: {done[-1]}", flush=True)
    grown, others = growth(done), other_pictures(done)
    too_much = [kind for kind, nbytes in grown.items() if nbytes > SLACK_BYTES[kind]]
    report = {"torch": torch.__version__, "grown": grown, "other_pictures": others, "done": done}
    (given.output / "soak.json").write_text(json.dumps(report, indent=1, default=dataclasses.asdict))
    print(f"{len(done)} of {given.prompts} prompts, {statistics.median(one.seconds for one in done):.2f} s each")
    print("second half against the first: " + ", ".join(f"{kind} {n / MIB:+.1f} MiB" for kind, n in grown.items()))
    if too_much or others:
        sys.exit(f"grown too much: {too_much or 'nothing'}; other pictures than the first time: {others or 'none'}")
    print("nothing grew, and every picture is bit-equal to the first of its kind")


if __name__ == "__main__":
    main()
