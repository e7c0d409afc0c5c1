"""Makes NF4 and FP4 Flux checkpoints with random weights in the real layouts, for tests and measurements.

    python tools/make_checkpoint.py flux.safetensors --double 1 --single 1 --t5-layers 1
    python tools/make_checkpoint.py flux.safetensors --full --device cuda

Every weight comes from a generator seeded with its name and is quantised by bitsandbytes itself. ``--twin FILE``
also writes the dense twin: the same transformer with every 4-bit weight dequantised, which stock ComfyUI loads.
"""

import argparse
import functools
import hashlib
import json
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import checkpoint_layout as layout
import environment  # noqa: F401  makes orderly importable
import orderly
import package  # noqa: F401  says so where there is no PyTorch
import torch
from bitsandbytes import functional as bnb
from safetensors import SafetensorError
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]

TRANSFORMER = "model.diffusion_model."
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Recipe:
    """What the file holds. The defaults are the smallest file that ComfyUI sees as Flux."""

    variant: str = "dev"
    nested: bool = False
    quant_type: str = "nf4"
    blocksize: int = 64
    double_blocks: int = 1
    single_blocks: int = 1
    t5_layers: int = 1
    in_channels: int = 64
    hidden: int = 3072
    t5: int = 4096
    """The width of T5."""
    clip_l: int = 768
    """The width of CLIP-L."""
    unet_only: bool = False
    prefix: str = TRANSFORMER
    seed: int = 0
    device: str = "cpu"


def make_checkpoint(path: Path, recipe: Recipe, say: Callable[[str], None] = lambda _: None) -> None:
    """Write the checkpoint: v1 style if nested, else v2 style."""
    tensors: Tensors = {}
    for name, shape in _transformer_shapes(recipe).items():
        weight = None
        if _is_linear_weight(name, shape):
            say(f"quantise {name}")
            weight, state = quantised(recipe, name, shape)
            tensors |= {f"{recipe.prefix}{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
        tensors[recipe.prefix + name] = _random(recipe, name, shape).bfloat16() if weight is None else weight
    if not recipe.unet_only:
        tensors |= text_encoders_and_vae(recipe)
    _save(tensors, path)


def cached_checkpoint(folder: Path, recipe: Recipe, say: Callable[[str], None] = lambda _: None) -> Path:
    """The checkpoint for ``recipe`` in ``folder``, made if it is not there, or not whole, or of an older maker.

    One that an older maker made of the same recipe is removed.

    ``say`` is told what happens, if anything does.
    """
    maker = "".join(Path(source).read_text("utf-8") for source in (__file__, layout.__file__))
    style = "v1" if recipe.nested else "v2"
    name = f"flux1-{recipe.variant}-bnb-{recipe.quant_type}-{style}-tiny-{_key(recipe)}"
    path = folder / f"{name}-{_key(maker)}.safetensors"
    if not is_whole(path):
        say(f"{path.name} is {'damaged' if path.exists() else 'not there yet'}: making it (1 GB, about a minute)\n")
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"{name}-*.safetensors"):
            old.unlink()
        make_checkpoint(path, recipe, say)
        say(f"made {path}\n")
    return path


def _key(made_of: object) -> str:
    return hashlib.sha256(f"{made_of}".encode()).hexdigest()[:8]


def is_whole(path: Path) -> bool:
    """Whether a safetensors file is there, and as long as its header says."""
    try:
        nbytes = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, nbytes)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (OSError, ValueError):
        return False
    return 8 + length + max(ends) == nbytes


def make_twin(path: Path, recipe: Recipe, dtype: torch.dtype, say: Callable[[str], None] = lambda _: None) -> None:
    """Write the dense twin: fp32 is exact; bf16 is what a GPU computes with."""
    tensors: Tensors = {}
    for name, shape in _transformer_shapes(recipe).items():
        if _is_linear_weight(name, shape):
            say(f"dequantise {name}")
            weight, state = quantised(recipe, name, shape)
            # Flat: for rows that end inside a block, bitsandbytes' CPU kernel gives wrong values.
            state.dtype, state.shape = dtype, torch.Size((math.prod(shape),))
            tensors[TRANSFORMER + name] = bnb.dequantize_4bit(weight, state).view(shape)
        else:
            # A file has one weight dtype for ComfyUI's eyes; bf16 values are exact in both.
            tensors[TRANSFORMER + name] = _random(recipe, name, shape).bfloat16().to(dtype)
    if not recipe.unet_only:
        tensors |= text_encoders_and_vae(recipe)
    _save(tensors, path)


def quantised(recipe: Recipe, name: str, shape: tuple[int, ...]) -> tuple[torch.Tensor, bnb.QuantState]:
    """The packed weight, uint8 ((n + 1) // 2, 1), and the quant state that bitsandbytes makes of it."""
    weight, absmax = _packed(recipe.seed, name, shape, recipe.blocksize, recipe.quant_type, recipe.device)
    code = bnb.get_4bit_type(recipe.quant_type, device=recipe.device)
    fields = {"blocksize": recipe.blocksize, "code": code, "quant_type": recipe.quant_type, "dtype": torch.bfloat16}
    if not recipe.nested:
        return weight, bnb.QuantState(absmax=absmax, shape=torch.Size(shape), **fields)
    # The second stage of bitsandbytes.functional.quantize_4bit(compress_statistics=True), on the absmax we have.
    offset = absmax.mean()
    codes, state2 = bnb.quantize_blockwise(absmax - offset, blocksize=256)
    return weight, bnb.QuantState(absmax=codes, shape=torch.Size(shape), offset=offset, state2=state2, **fields)


@functools.cache
def _packed(
    seed: int, name: str, shape: tuple[int, ...], blocksize: int, quant_type: str, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    weight = _values(seed, name, shape, device).bfloat16()
    packed, state = bnb.quantize_4bit(weight, blocksize=blocksize, quant_type=quant_type)
    return packed, state.absmax


def forget_weights() -> None:
    """Free the packed weights that are kept for the next file."""
    _packed.cache_clear()


def text_encoders_and_vae(recipe: Recipe) -> Tensors:
    """CLIP-L in fp16, T5 in fp8 e4m3, VAE in bf16, as in lllyasviel's files."""
    parts = (
        ("text_encoders.clip_l.", layout.clip_l(recipe.clip_l), torch.float16),
        ("text_encoders.t5xxl.", layout.t5_xxl(recipe.t5_layers, recipe.t5), torch.float8_e4m3fn),
        ("vae.", layout.vae(), torch.bfloat16),
    )
    return {
        prefix + name: _random(recipe, prefix + name, shape).to(dtype)
        for prefix, shapes, dtype in parts
        for name, shape in shapes.items()
    }


def _transformer_shapes(recipe: Recipe) -> layout.Shapes:
    guidance = recipe.variant == "dev"
    return layout.flux(
        recipe.double_blocks,
        recipe.single_blocks,
        guidance=guidance,
        in_channels=recipe.in_channels,
        hidden=recipe.hidden,
        t5=recipe.t5,
        clip_l=recipe.clip_l,
    )


def _is_linear_weight(name: str, shape: tuple[int, ...]) -> bool:
    return name.endswith(".weight") and len(shape) == 2


def _random(recipe: Recipe, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return _values(recipe.seed, name, shape, recipe.device)


def _values(seed: int, name: str, shape: tuple[int, ...], device: str) -> torch.Tensor:
    """Values that keep activations near unit size, fp32: norms around one, weights by their fan-in."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()) + seed)
    values = torch.randn(shape, generator=generator, device=device)
    if len(shape) > 1:
        return values.div_(math.sqrt(math.prod(shape[1:])))
    is_norm = name.endswith((".scale", "norm.weight", "norm1.weight", "norm2.weight", "norm_out.weight"))
    return values.mul_(0.1).add_(1.0 if is_norm else 0.0)


def _save(tensors: Tensors, path: Path) -> None:
    """
    Raises:
        SystemExit: the file could not be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, partial)
        partial.replace(path)
    except SafetensorError as error:  # of the machine, too, such as a full disk
        raise SystemExit(f"{path}: writing it failed ({error}). Is there room on the disk?") from None
    finally:
        partial.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--variant", choices=("dev", "schnell"), default="dev")
    parser.add_argument("--style", choices=("v1", "v2"), default="v2", help="v1: nested absmax; v2: fp32 absmax")
    parser.add_argument("--quant-type", choices=("nf4", "fp4"), default="nf4")
    parser.add_argument("--blocksize", type=int, default=64)
    parser.add_argument("--double", type=int, default=1, help="double blocks (19 in the real model)")
    parser.add_argument("--single", type=int, default=1, help="single blocks (38 in the real model)")
    parser.add_argument("--t5-layers", type=int, default=1, help="layers of the T5 (24 in the real model)")
    parser.add_argument("--in-channels", type=int, default=64, help="64; 128 for Canny and Depth, 384 for Fill")
    parser.add_argument("--full", action="store_true", help="the real depth: 19 double, 38 single, 24 T5 layers")
    parser.add_argument("--unet-only", action="store_true", help="no text encoders, no VAE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="where weights are made and quantised")
    parser.add_argument("--twin", type=Path, metavar="FILE", help="also write the dense twin")
    parser.add_argument("--twin-dtype", choices=DTYPES, default="fp32")
    given = parser.parse_args()
    recipe = Recipe(
        variant=given.variant,
        nested=given.style == "v1",
        quant_type=given.quant_type,
        blocksize=given.blocksize,
        double_blocks=19 if given.full else given.double,
        single_blocks=38 if given.full else given.single,
        t5_layers=24 if given.full else given.t5_layers,
        in_channels=given.in_channels,
        unet_only=given.unet_only,
        seed=given.seed,
        device=given.device,
    )
    make_checkpoint(given.output, recipe, say=print)
    print(f"{given.output}: {given.output.stat().st_size / 2**30:.2f} GiB")
    if given.twin:
        make_twin(given.twin, recipe, DTYPES[given.twin_dtype], say=print)
        print(f"{given.twin}: {given.twin.stat().st_size / 2**30:.2f} GiB")


if __name__ == "__main__":
    orderly.run(main)
