"""Makes an NF4 or FP4 file of Flux.1, FLUX.2, Chroma, Qwen-Image, Ideogram 4 or Krea 2, from bf16, fp16, fp8 or GGUF.

The model may be one file, shards or a folder of diffusers.

    python commands/quantise.py flux1-dev.safetensors flux1-dev-nf4.safetensors
    python commands/quantise.py flux1-dev-Q8_0.gguf flux1-dev-fp4.safetensors --type fp4 --nested

Run it with the Python that runs ComfyUI, which has what it needs: PyTorch, bitsandbytes and, for GGUF, gguf.
"""

import argparse
import sys
import time
from pathlib import Path

import orderly
import package  # noqa: F401  makes flux_nf4 importable
import terminal
import torch

from flux_nf4.families import CHECKPOINT_PREFIX
from flux_nf4.memory import GIB
from flux_nf4.nf4_loader.checkpoint.errors import CheckpointError
from flux_nf4.nf4_loader.saving.quantise import QuantSettings
from flux_nf4.nf4_loader.saving.save import layer_patterns, save_quantised
from flux_nf4.nf4_loader.saving.sources import has_others, sources_of_file


def main() -> None:
    terminal.replace_what_it_lacks()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a .safetensors or .gguf file, any one shard, an index or a folder")
    parser.add_argument("output", type=Path, help="the new .safetensors file")
    parser.add_argument("--type", choices=("nf4", "fp4"), default="nf4")
    parser.add_argument(
        "--nested", action="store_true", help="quantise absmax, too (v1): 8 %% smaller, a little less exact"
    )
    parser.add_argument("--all-in-one", action="store_true", help="keep the text encoders and the VAE of the file")
    parser.add_argument(
        "--keep-dense", default="", metavar="LAYERS", help="with commas between them, such as 'img_in, final_layer.*'"
    )
    parser.add_argument("--device", type=_device, default="cpu", help="where to quantise, such as cuda")
    parser.add_argument("--force", action="store_true", help="replace a file that exists")
    given = parser.parse_args()
    if not given.model.exists():
        raise SystemExit(f"{given.model}: there is no such file or folder.")
    if given.output.is_dir():
        raise SystemExit(f"{given.output}: it is a folder. Give the new file's name.")
    if given.output.suffix != ".safetensors":
        raise SystemExit(f"{given.output}: it becomes a safetensors file, so end its name in .safetensors.")
    if given.output.exists() and given.model.exists() and given.output.samefile(given.model):
        raise SystemExit(f"{given.output}: it would replace the file that it is made of. Choose another name.")
    if given.output.exists() and not given.force:
        raise SystemExit(f"{given.output}: it exists already. Choose another name, or add --force to replace it.")
    if not given.output.parent.is_dir():
        raise SystemExit(f"{given.output.parent}: there is no such folder. Make it first.")
    try:
        torch.empty(0, device=given.device)
    except (RuntimeError, AssertionError) as error:  # whatever torch says of what is not there
        raise SystemExit(f"--device {given.device}: it cannot be used ({error}).") from None
    try:
        _quantise(given)
    except CheckpointError as error:
        raise SystemExit(str(error)) from None


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{name} is no device of PyTorch, such as cpu or cuda") from None


def _quantise(given: argparse.Namespace) -> None:
    sources = sources_of_file(given.model, all_in_one=given.all_in_one)
    total = sum(torch.Size(source.shape).numel() for source in sources)
    started, done = time.monotonic(), 0

    def progress(numel: int) -> None:
        nonlocal done
        before, done = done, done + numel
        if 100 * done // total > 100 * before // total:
            spent = time.monotonic() - started
            print(f"\r{100 * done // total:3} %  {spent:.0f} s", end="", file=sys.stderr, flush=True)

    save_quantised(
        given.output,
        sources,
        QuantSettings(given.type, given.nested),
        prefix=CHECKPOINT_PREFIX if given.all_in_one else "",
        keep_dense=layer_patterns(given.keep_dense),
        metadata={"flux_nf4.source": given.model.name},
        device=given.device,
        progress=progress,
    )
    print(f"\n{given.output}: {given.output.stat().st_size / GIB:.2f} GiB")
    if not given.all_in_one and has_others(given.model):
        print("It is the transformer only, for models/diffusion_models: --all-in-one keeps text encoders and VAE, too.")


if __name__ == "__main__":
    orderly.run(main)
