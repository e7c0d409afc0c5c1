"""How far pictures in int8 are from exact ones, on your own checkpoint: same seeds and prompts in both ways.

    COMFYUI_PATH=~/ComfyUI python benchmarks/fidelity.py flux1-dev-bnb-nf4-v2.safetensors --output results

For each prompt and seed it prints the relative error of the predicted picture (latents) after each step and of the
final latents, the PSNR of the pictures in dB, and the time of a step in both ways. It writes ``fidelity.json``, and the
pictures of an all-in-one file, exact and int8. A file that holds a transformer alone gets random text, and no pictures.
Run it with ComfyUI's Python.
"""

import json
import time
from pathlib import Path
from typing import Any

import needs_torch  # noqa: F401
import orderly
import torch
from about import about
from arguments import begin, parser_for, positive
from inside_comfyui import import_package, use_allocator_of_comfyui
from weights import Files

PROMPTS = (
    "a photo of a fox in the snow, morning light",
    "the word STREAM painted on a brick wall",
    "portrait of an old fisherman, oil painting",
)
EXACT, FASTER = "exact", "int8 where faster"


def random_text(seed: int) -> list[Any]:
    """What a text encoder could give."""
    generator = torch.Generator().manual_seed(seed)
    text, pooled = torch.randn(1, 256, 4096, generator=generator), torch.randn(1, 768, generator=generator)
    return [[text, {"pooled_output": pooled}]]


def encoded(clip: Any, prompt: str) -> list[Any]:
    text, pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)
    return [[text, {"pooled_output": pooled}]]


def sampled(patcher: Any, positive: list[Any], seed: int, side: int, steps: int) -> tuple[list[torch.Tensor], float]:
    """The picture predicted after each step, then the final latents; and seconds of a step, without the first."""
    import comfy.sample

    latent = torch.zeros(1, 16, side // 8, side // 8)
    noise = comfy.sample.prepare_noise(latent, seed)
    seen: list[torch.Tensor] = []
    moments: list[float] = []

    def note(step: int, predicted: torch.Tensor, *_: Any) -> None:
        seen.append(predicted.float().cpu())  # waits for the device
        moments.append(time.perf_counter())

    final = comfy.sample.sample(
        patcher, noise, steps, 1.0, "euler", "simple", positive, positive, latent, callback=note, seed=seed
    )
    return [*seen, final.float().cpu()], (moments[-1] - moments[0]) / max(len(moments) - 1, 1)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def psnr(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of pictures from 0 to 1, in dB."""
    return float(-10 * torch.log10((found - expected).square().mean().clamp(min=1e-10)))


def write_picture(picture: torch.Tensor, path: Path) -> None:
    from PIL import Image

    Image.fromarray((255 * picture[0].clamp(0, 1)).byte().cpu().numpy()).save(path)


def compared(given: Any, file: Path) -> list[dict[str, Any]]:
    from flux_nf4.checkpoints import load_all_in_one, load_transformer, streamed
    from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue
    from flux_nf4.nodes_compute import choose
    from flux_nf4.offload.plan import Residency

    catalogue = read_catalogue(file)
    loaded = load_all_in_one(catalogue) if catalogue.text_encoders and catalogue.vae else None
    model = load_transformer(catalogue) if loaded is None else loaded.model
    texts = [random_text(i) if loaded is None else encoded(loaded.clip, p) for i, p in enumerate(PROMPTS)]
    rows = []
    for prompt, text in zip(PROMPTS, texts, strict=True):
        for seed in range(given.seeds):
            latents, seconds, pictures = {}, {}, {}
            for compute in (EXACT, FASTER):
                patcher = choose(streamed(model, Residency(), None), compute)
                sampled(patcher, text, seed, given.pixels, 1)  # loads, measures
                latents[compute], seconds[compute] = sampled(patcher, text, seed, given.pixels, given.steps)
                if loaded is not None:
                    pictures[compute] = loaded.vae.decode(latents[compute][-1])
                    name = f"{PROMPTS.index(prompt)}-{seed}-{compute.split()[0]}.png"
                    write_picture(pictures[compute], given.output / name)
            errors = [relative(*pair) for pair in zip(latents[FASTER], latents[EXACT], strict=True)]
            row = {"prompt": prompt, "seed": seed, "errors": errors, "seconds": seconds}
            rows.append(row | ({"psnr": psnr(pictures[FASTER], pictures[EXACT])} if pictures else {}))
            print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    *steps, final = (f"{error:.4f}" for error in row["errors"])
    times = " | ".join(f"{1000 * row['seconds'][compute]:.0f}" for compute in (EXACT, FASTER))
    quality = f"{row['psnr']:.1f}" if "psnr" in row else "-"
    return f"| {row['prompt']} | {row['seed']} | {' '.join(steps)} | {final} | {quality} | {times} |"


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument(
        "file", type=Path, nargs="?", help="an NF4 or FP4 file; made, with random weights, if not given"
    )
    parser.add_argument("--pixels", type=positive, default=1024, help="side of the pictures")
    parser.add_argument("--steps", type=positive, default=20, help="of each picture")
    parser.add_argument("--seeds", type=int, default=2, help="pictures of each prompt")
    given = parser.parse_args()
    given.checkpoint = given.file or given.checkpoint
    use_allocator_of_comfyui()
    begin(given)
    import_package()
    files = Files(given.folder, given.checkpoint, given.dry_run)
    files.enter()
    import comfy.model_management

    from flux_nf4.nf4_loader.linear import kitchen

    problem = kitchen.problem_on(comfy.model_management.get_torch_device(), torch.bfloat16)
    print(f"int8: {problem or 'can be used'}\n")
    print("| prompt | seed | error after each step | final | PSNR dB | ms exact | int8 |")
    print("|" + "---|" * 7, flush=True)
    with torch.inference_mode():
        rows = compared(given, files.nf4())
    (given.output / "fidelity.json").write_text(json.dumps({"about": about(), "int8_problem": problem, "rows": rows}))


if __name__ == "__main__":
    orderly.run(main)
