"""What streaming FLUX.2 in NF4 costs: dev (32 billion weights) and klein 4B, on the whole card and on small ones.

    COMFYUI_PATH=~/ComfyUI python benchmarks/flux2.py
    COMFYUI_PATH=~/ComfyUI python benchmarks/flux2.py --models klein-4b --pixels 512

Run it with ComfyUI's Python: 0.3.72 or newer for dev, 0.9.2 or newer for klein. The weights are random and quantised on
the GPU, layer by layer, into one file in the names of diffusers (dev 18 GB, klein 4B 2.2 GB; kept in ``--folder``).
Prints a table and writes ``flux2.json``. It fails where the output of one setting differs from that of another.
"""

import functools
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import needs_torch  # noqa: F401
import orderly
import torch
from arguments import begin, plain_parser, positive
from cases import Case
from inside_comfyui import import_package, use_allocator_of_comfyui
from memory import GIB, capped
from timing import milliseconds

STD = 0.02
"""Of the random weights: small, so that no layer's output runs away."""


class Size(NamedTuple):
    """Of one model: the width of a token and of the text, blocks of each kind, and whether it is told the guidance."""

    hidden: int
    text: int
    doubles: int
    singles: int
    guidance: bool


class Setting(NamedTuple):
    """Blocks of each kind that stay (None: as many as ComfyUI has room for), on a card of so many GiB (0: this one)."""

    double: int | None = None
    single: int | None = None
    cap_gib: float = 0


SIZES = {
    "dev": Size(6144, 15360, 8, 48, True),
    "klein-9b": Size(4096, 12288, 8, 24, False),
    "klein-4b": Size(3072, 7680, 5, 20, False),
}
TINY = Size(256, 96, 2, 3, True)
SETTINGS = {
    "all resident": Setting(999, 999),
    "0/0": Setting(0, 0),
    "0/0 on 8 GiB": Setting(0, 0, 8),
    "automatic on 8 GiB": Setting(cap_gib=8),
    "automatic on 4 GiB": Setting(cap_gib=4),
}
WHERE = {"dev": ("automatic on 4 GiB",)}
"""What of `SETTINGS` is not for a model."""


def make(path: Path, size: Size, device: torch.device) -> None:
    """Write such a model with random weights in NF4, each quantised by bitsandbytes on ``device``."""
    import checkpoint_layout as layout

    from flux_nf4.nf4_loader.saving.quantise import QuantSettings
    from flux_nf4.nf4_loader.saving.save import Source, save_quantised

    def values(shape: tuple[int, ...], _: torch.device) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return torch.randn(shape, dtype=torch.bfloat16, device=device, generator=generator) * STD

    generator = torch.Generator(device).manual_seed(0)
    sources = [
        Source(name, shape, functools.partial(values, shape))
        for name, shape in layout.flux2_of_diffusers(*size).items()
    ]
    save_quantised(path, sources, QuantSettings(), device=device)


def made(folder: Path, name: str, size: Size) -> Path:
    """The file of the model, which is written if it is not there."""
    path = folder / f"flux2-{name}-nf4.safetensors"
    if not path.exists():
        make(path, size, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return path


def measure(path: Path, settings: Mapping[str, Setting], case: Case, repeats: int) -> list[dict[str, Any]]:
    """One row for each setting: time and memory of a forward, and what crossed the bus."""
    from streamed import load

    patcher = load(path)
    reference = None
    rows: list[dict[str, Any]] = []
    for name, setting in settings.items():
        with capped(patcher.load_device, setting.cap_gib) as taken:
            row, output = _measure(patcher, setting, case, repeats, taken)
        reference = output if reference is None else reference
        if not torch.equal(output, reference):
            raise SystemExit(f"{path.name}, {name}: the output differs")
        rows.append({"setting": name, **row, "ratio": row["ms"] / (rows[0] if rows else row)["ms"]})
        print("|", " | ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    return rows


def _measure(
    patcher: Any, setting: Setting, case: Case, repeats: int, taken: int
) -> tuple[dict[str, Any], torch.Tensor]:
    from comfy_model import at_work
    from streamed import with_residency

    device, is_cuda = patcher.load_device, patcher.load_device.type == "cuda"
    with at_work(with_residency(patcher, setting.double, setting.single), case) as model:
        model.load()
        model.forward()  # in ComfyUI 0.33 the first one of a process rounds otherwise
        output = model.forward().cpu()
        if is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        times = milliseconds(model.forward, repeats + 1, device)[1:]
        plan = patcher.model.streaming.streamer.plan  # None on a CPU, which computes from host memory
        return {
            "blocks_that_stay": len(plan.resident) if plan is not None else 0,
            "ms": statistics.median(times),
            "peak_gib": (torch.cuda.max_memory_allocated() - taken) / GIB if is_cuda else 0.0,
            "ring_mib": plan.staging_bytes / 2**20 if plan is not None else 0.0,
            "bus_gb": plan.bytes_per_forward / 1e9 if plan is not None else 0.0,
        }, output


def table(results: Mapping[str, Any]) -> str:
    lines = ["| model | setting | blocks that stay | ms | against resident | peak GiB | ring MiB | GB over the bus |"]
    lines.append("|---" * 8 + "|")
    for name, rows in results["models"].items():
        for row in rows:
            figures = f"{row['ms']:.1f} | {row['ratio']:.3f} | {row['peak_gib']:.2f} | {row['ring_mib']:.0f}"
            lines.append(f"| {name} | {row['setting']} | {row['blocks_that_stay']} | {figures} | {row['bus_gb']:.2f} |")
    return "\n".join(lines)


def run(folder: Path, output: Path, models: Mapping[str, Size], case: Case, repeats: int) -> dict[str, Any]:
    is_cuda = torch.cuda.is_available()
    results: dict[str, Any] = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if is_cuda else "cpu",
        "pixels": case.pixels,
        "models": {},
    }
    for name, size in models.items():
        settings = {
            key: setting if is_cuda else setting._replace(cap_gib=0)
            for key, setting in SETTINGS.items()
            if key not in WHERE.get(name, ())
        }
        results["models"][name] = measure(made(folder, name, size), settings, case, repeats)
        (output / "flux2.json").write_text(json.dumps(results, indent=1))
    return results


def main() -> None:
    parser = plain_parser(__doc__)
    parser.set_defaults(checkpoint=None, can_be_dry=True)
    parser.add_argument("--folder", type=Path, default=Path(".cache/benchmarks"), help="where weights are kept")
    parser.add_argument("--models", nargs="+", choices=SIZES, default=["dev", "klein-4b"], help="what to measure")
    parser.add_argument("--pixels", type=positive, default=1024, help="width and height of the picture")
    parser.add_argument("--repeats", type=positive, default=8, help="timed forwards of each setting")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model, to try it without a GPU")
    given = parser.parse_args()
    use_allocator_of_comfyui()
    begin(given)
    import_package()
    models = {name: SIZES[name] for name in given.models}
    case = Case("", given.pixels)
    if given.dry_run:
        take_tiny_models()
        models, case = {"tiny": TINY}, Case("", 64, text_tokens=8)
    with torch.inference_mode():
        results = run(given.folder, given.output, models, case, given.repeats)
    print(table(results))


def take_tiny_models() -> None:
    """Have ComfyUIs that give every FLUX.2 as many heads as dev take `TINY`, too."""
    from comfy.supported_models import Flux2

    Flux2.unet_extra_config = {**Flux2.unet_extra_config, "num_heads": TINY.hidden // 128}


if __name__ == "__main__":
    orderly.run(main)
