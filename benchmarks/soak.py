"""Many prompts in one process, each other than the one before: does anything grow, is any picture another one?

    COMFYUI_PATH=~/ComfyUI python benchmarks/soak.py
    COMFYUI_PATH=~/ComfyUI python benchmarks/soak.py --checkpoint flux1-dev-bnb-nf4-v2.safetensors --prompts 200

Run it with ComfyUI's Python. Prompts are drawn at random, with a fixed seed: which file (NF4, NF4 with nested absmax,
INT8 ConvRot where ComfyUI knows it), size of the picture, LoRAs, blocks that stay, and now and then all models unloaded
before it, as ComfyUI's button does. With ``--encoder`` each prompt first has Mistral 3 in NF4 (10.7 GB) encode a text,
within a budget that is drawn, too. It fails if a picture is not bit-equal to the first one of its file, size and LoRAs,
whatever stayed, or an encoding is not, or if memory grew: of the device, pinned, or of the host. For that all models
are unloaded after half of the prompts and after the last: what is in use after a prompt depends on the prompts before.
Writes ``soak.json``.
"""

import dataclasses
import gc
import hashlib
import json
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import needs_torch  # noqa: F401
import orderly
import text_encoder
import torch
from arguments import begin, parser_for, positive
from cases import Case
from inside_comfyui import import_package, use_allocator_of_comfyui
from memory import Use, resident_bytes
from weights import TINY_BLOCKS, Files

MIB = 2**20
SLACK_BYTES = {"device": 64 * MIB, "allocated": MIB, "pinned": 0, "resident": 64 * MIB}
"""By how much each may be higher at the end than after half of the prompts: allocators round, kernels load late."""


@dataclass(frozen=True)
class Prompt:
    file: str
    pixels: int
    loras: int
    double: int
    single: int
    unloads_first: bool
    encoder_gib: float | None = None

    def __str__(self) -> str:
        unloaded = ", all unloaded before" if self.unloads_first else ""
        if self.encoder_gib is not None:
            unloaded += f", encoder within {self.encoder_gib:g} GiB" if self.encoder_gib else ", encoder automatic"
        blocks = f"{self.double}/{self.single} blocks stay"
        return f"{self.file}, {self.pixels}x{self.pixels}, {self.loras} LoRAs, {blocks}{unloaded}"


@dataclass(frozen=True)
class Memory:
    """Bytes in use."""

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


def load_all(files: Files) -> dict[str, Any]:
    """A streamed patcher of each file, all with the same weights before they were quantised."""
    from native_files import has_formats
    from streamed import load

    patchers = {"nf4": load(files.nf4()), "nested": load(files.nf4(nested=True))}
    if has_formats():
        import comfy.sd

        from flux_nf4.offload.comfyui.adopt import stream_model
        from flux_nf4.offload.plan import Residency

        loaded = comfy.sd.load_diffusion_model(str(files.native("int8")))
        patchers["int8"] = stream_model(loaded, Residency(), None)
    return patchers


class Encoder:
    """Mistral 3 with random weights, and the text that it encodes each time."""

    def __init__(self, folder: Path, *, is_tiny: bool) -> None:
        if is_tiny:
            text_encoder.shrink_comfyui()
        sizes = text_encoder.TINY if is_tiny else text_encoder.FULL
        self._loaded = text_encoder.load_encoder(text_encoder.write_encoder(folder, sizes))
        self._tokens = text_encoder.tokens(16 if is_tiny else 512, sizes["vocabulary"], 0)
        self.patcher = self._loaded.patcher

    def encode(self, budget_gib: float) -> torch.Tensor:
        """Within this budget; 0 is as much as there is room for."""
        from flux_nf4.encoders import streamed_clip
        from flux_nf4.offload.plan import Residency

        clip = streamed_clip(self._loaded, Residency(budget_bytes=int(budget_gib * 2**30) or None), None)
        encoded: torch.Tensor = clip.encode_from_tokens(self._tokens)
        return encoded


def encoder_if_known(folder: Path, *, is_tiny: bool) -> Encoder | None:
    """None, and a line that says why, where this ComfyUI or its transformers cannot read Mistral 3."""
    from flux_nf4.nf4_loader.checkpoint.errors import CheckpointError

    try:
        if text_encoder.is_known():
            return Encoder(folder, is_tiny=is_tiny)
        print("without a text encoder: this ComfyUI has no Mistral 3", flush=True)
    except CheckpointError as error:
        print(f"without a text encoder: {error}", flush=True)
    return None


def prompts(count: int, names: Sequence[str], *, is_tiny: bool, encodes: bool = False) -> list[Prompt]:
    draw, draw_budget = random.Random(0), random.Random(1)
    budgets = (0.0, 0.5) if is_tiny else (0.0, 1.0, 3.0)
    sizes = (64, 96) if is_tiny else (512, 768, 1024)
    depths = (*((n, n) for n in range(2)), TINY_BLOCKS) if is_tiny else ((0, 0), (7, 7), (12, 24), (3, 0), (19, 38))
    drawn = []
    for _ in range(count):
        name, pixels, loras, counts = (
            draw.choice(names),
            draw.choice(sizes),
            draw.choice((0, 0, 1, 2)),
            draw.choice(depths),
        )
        budget = draw_budget.choice(budgets) if encodes else None
        drawn.append(Prompt(name, pixels, loras, *counts, draw.random() < 0.1, budget))
    return drawn


def run(patchers: Mapping[str, Any], encoder: Encoder | None, prompt: Prompt, steps: int, text_tokens: int) -> Done:
    """Run one prompt. Its digest is of the picture and, with ``encoder``, of what the text became."""
    import comfy.model_management
    from comfy_model import ComfyModel
    from streamed import with_residency

    if prompt.unloads_first:
        comfy.model_management.unload_all_models()
    case = Case("", prompt.pixels, steps=steps, loras=prompt.loras, rank=16, text_tokens=text_tokens)
    started, digest = time.perf_counter(), hashlib.sha256()
    if encoder is not None:
        digest.update(encoder.encode(prompt.encoder_gib or 0.0).float().cpu().numpy().tobytes())
    patcher = with_residency(patchers[prompt.file], prompt.double, prompt.single)
    picture = ComfyModel(patcher, case).sample(lambda: None)
    seconds = time.perf_counter() - started
    digest.update(picture.float().numpy().tobytes())
    gc.collect()
    return Done(prompt, digest.hexdigest(), seconds, memory_of(held_by(patchers, encoder)))


def held_by(patchers: Mapping[str, Any], encoder: Encoder | None) -> list[Any]:
    return [*patchers.values(), *([encoder.patcher] if encoder is not None else [])]


def at_rest(held: Sequence[Any]) -> Memory:
    """With nothing on the device that can be unloaded."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache(True)
    return memory_of(held)


def memory_of(patchers: Sequence[Any]) -> Memory:
    use = Use.now(patchers[0].load_device)
    pinned = sum(patcher.model.streaming.streamer.pinned_bytes for patcher in patchers)
    return Memory(use.device, use.allocated, pinned, resident_bytes())


def other_pictures(done: Sequence[Done]) -> list[int]:
    """Indices of prompts whose picture is not the first one of their file, size and LoRAs."""
    first: dict[tuple[str, int, int], str] = {}
    return [
        index
        for index, one in enumerate(done)
        if first.setdefault((one.prompt.file, one.prompt.pixels, one.prompt.loras), one.digest) != one.digest
    ]


def growth(rests: Sequence[Memory]) -> dict[str, int]:
    """By how many bytes each kind of memory is higher in the last of ``rests`` than in the first; none of fewer."""
    if len(rests) < 2:
        return {}
    return {kind: getattr(rests[-1], kind) - getattr(rests[0], kind) for kind in SLACK_BYTES}


def report(done: Sequence[Done], rests: Sequence[Memory]) -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "grown": growth(rests),
        "at_rest": rests,
        "slack": SLACK_BYTES,
        "other_pictures": other_pictures(done),
        "encodes": any(one.prompt.encoder_gib is not None for one in done),
        "done": done,
    }


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--prompts", type=positive, default=200, help="how many")
    parser.add_argument("--steps", type=positive, default=4, help="of each")
    parser.add_argument("--encoder", action="store_true", help="with a text encoder, where ComfyUI knows Mistral 3")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin no prompt after this time")
    given = parser.parse_args()
    use_allocator_of_comfyui()
    begin(given)
    until = time.monotonic() + 60 * given.minutes
    import_package()
    files = Files(given.folder, given.checkpoint, given.dry_run)
    files.enter()
    done: list[Done] = []
    rests: list[Memory] = []
    with torch.inference_mode():
        patchers = load_all(files)
        encoder = encoder_if_known(given.folder, is_tiny=given.dry_run) if given.encoder else None
        drawn = prompts(given.prompts, list(patchers), is_tiny=given.dry_run, encodes=encoder is not None)
        for prompt in drawn:
            if time.monotonic() < until:
                done.append(run(patchers, encoder, prompt, given.steps, text_tokens=8 if given.dry_run else 512))
                print(f"{len(done)}: {done[-1]}", flush=True)
                if len(done) in (max(1, len(drawn) // 2), len(drawn)):
                    rests.append(at_rest(held_by(patchers, encoder)))
                (given.output / "soak.json").write_text(json.dumps(report(done, rests), default=dataclasses.asdict))
    grown, others = growth(rests), other_pictures(done)
    too_much = [kind for kind, nbytes in grown.items() if nbytes > SLACK_BYTES[kind]]
    print(f"{len(done)} of {given.prompts} prompts, {statistics.median(one.seconds for one in done):.2f} s each")
    told = ", ".join(f"{kind} {n / MIB:+.1f} MiB" for kind, n in grown.items()) or "not measured, it was cut"
    print(f"at rest, the end against the middle: {told}")
    if too_much or others:
        sys.exit(f"grown too much: {too_much or 'nothing'}; other pictures than the first time: {others or 'none'}")
    if not grown:
        sys.exit("growth was not measured: for that all prompts have to run, two at least")
    print("nothing grew, and every picture is bit-equal to the first of its kind")


if __name__ == "__main__":
    orderly.run(main)
