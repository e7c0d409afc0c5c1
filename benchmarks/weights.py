"""One full-size Flux with random weights in every format that is compared, each made once in a folder.

The NF4 file is made by bitsandbytes itself, on the GPU in seconds; the others are its dequantised values in another
format, so that all contenders compute about the same picture.
"""

import functools
import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from native_files import FORMATS, has_formats, write_native

GGUF_BLOCK = 32
TINY_BLOCKS = (2, 3)
"""Double and single blocks of the small model, whose hidden size is `tiny_flux.HIDDEN`."""


@dataclass(frozen=True)
class Files:
    """Where the weights are, or are to be made.

    ``checkpoint`` is a user's NF4 file, None for one with random weights; ``is_tiny`` makes that one small.
    """

    folder: Path
    checkpoint: Path | None = None
    is_tiny: bool = False

    def enter(self) -> None:
        """Make ComfyUI, in this process, take the tiny model if these are its files."""
        if self.is_tiny:
            import comfy.model_detection
            from tiny_flux import detection_of

            comfy.model_detection.model_config_from_unet = detection_of(*TINY_BLOCKS)
            torch.set_num_threads(1)  # it is small, and other processes work beside it

    def make(self, family: str) -> None:
        """Make what ``family`` (`contenders.family_maker`) reads, so that its loading can be timed without that."""
        self.nf4(nested=family.endswith("-v1"))
        if family == "gguf" and importlib.util.find_spec("gguf"):
            self.gguf()
        elif family == "comfy-fp8":
            self.dense(torch.float8_e4m3fn)
        elif (kind := family.removeprefix("comfy-")) in FORMATS and has_formats():
            self.native(kind)
        elif family == "comfy-bf16" or family.startswith("diffusers-"):
            self.dense(torch.bfloat16)

    def nf4(self, *, nested: bool = False) -> Path:
        """The user's file; if there is none or its absmax has to be ``nested``, one with random weights."""
        if nested:
            return self.made("flux-nf4-v1.safetensors", functools.partial(self._make_nf4, nested=True))
        return self.checkpoint or self.made("flux-nf4.safetensors", self._make_nf4)

    def dense(self, dtype: torch.dtype) -> Path:
        """All tensors in ``dtype``, in Black Forest Labs' names."""
        name = f"flux-{str(dtype).removeprefix('torch.')}.safetensors"
        return self.made(name, lambda path: write_dense(path, self.nf4(), dtype))

    def native(self, kind: str) -> Path:
        """The blocks' matrices in a format of ComfyUI's own (`native_files.FORMATS`), the rest in bf16."""
        from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue

        def write(path: Path) -> None:
            write_native(path, dense_tensors(read_catalogue(self.nf4()), torch.bfloat16), kind)

        return self.made(f"flux-{kind}.safetensors", write)

    def gguf(self) -> Path:
        """The matrices of the blocks as Q4_0, the rest as fp32."""
        return self.made("flux-q4_0.gguf", lambda path: write_gguf(path, self.nf4()))

    def diffusers_config(self) -> Path:
        """A folder with the configuration that diffusers wants beside a single file."""
        return self.made("diffusers", self._write_config)

    def made(self, name: str, make: Callable[[Path], None]) -> Path:
        """The file ``name`` of the folder, which ``make`` writes if it is not there."""
        path = self.folder / name
        if not path.exists():
            partial = self.folder / f"{os.getpid()}.{name}"
            make(partial)
            partial.replace(path)
        return path

    def _make_nf4(self, path: Path, *, nested: bool = False) -> None:
        from make_checkpoint import Recipe, forget_weights, make_checkpoint
        from tiny_flux import HIDDEN

        device = "cuda" if torch.cuda.is_available() else "cpu"
        (doubles, singles), hidden = (TINY_BLOCKS, HIDDEN) if self.is_tiny else ((19, 38), 3072)
        recipe = Recipe(
            nested=nested,
            double_blocks=doubles,
            single_blocks=singles,
            hidden=hidden,
            unet_only=True,
            device=device,
        )
        make_checkpoint(path, recipe)
        forget_weights()
        if device == "cuda":
            torch.cuda.empty_cache()

    def _write_config(self, folder: Path) -> None:
        from diffusers import FluxTransformer2DModel

        folder.mkdir()
        config = {"_class_name": FluxTransformer2DModel.__name__, "guidance_embeds": True}
        (folder / "config.json").write_text(json.dumps(config))


def dense_tensors(catalogue: Any, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Every transformer tensor of an NF4 file (its catalogue) by name, dequantised, on the CPU, one after the other."""
    from flux_nf4.nf4_loader.checkpoint.read_parts import read_fused
    from flux_nf4.nf4_loader.linear.kernels import dequantise
    from flux_nf4.nf4_loader.saving.dense import read_dense

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, tensor in catalogue.transformer.items():
        state = tensor.fused
        if state is None or tensor.halves_swapped:
            yield name, read_dense(tensor, torch.bfloat16).to(dtype)
        else:
            packed, absmax = (part.to(device) for part in read_fused(tensor))
            yield name, dequantise(packed, absmax, state, torch.bfloat16).to(dtype).cpu()


def write_dense(path: Path, nf4: Path, dtype: torch.dtype) -> None:
    """A safetensors file, written tensor by tensor: the whole is more than many a machine's memory."""
    from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue

    catalogue = read_catalogue(nf4)
    names = {torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}
    header, offset = {}, 0
    for name, shape in catalogue.logical_shapes.items():
        nbytes = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": shape, "data_offsets": (offset, offset + nbytes)}
        offset += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in dense_tensors(catalogue, dtype):
            file.write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]


def write_gguf(path: Path, nf4: Path) -> None:
    """As ComfyUI-GGUF reads it: the blocks' matrices in Q4_0, the rest in fp32."""
    import gguf

    from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue

    writer = gguf.GGUFWriter(path, "flux", use_temp_file=False)
    for name, tensor in dense_tensors(read_catalogue(nf4), torch.bfloat16):
        if tensor.dim() == 2 and "_blocks." in name:
            kind: Any = gguf.GGMLQuantizationType.Q4_0
            writer.add_tensor(name, quantise_q4_0(tensor).numpy(), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantise_q4_0(weight: torch.Tensor) -> torch.Tensor:
    """GGUF's Q4_0, as ggml's ``quantize_row_q4_0_ref`` makes it.

    For each 32 values of a row an fp16 scale d, the value of largest magnitude over -8, and 16 bytes of codes
    round(value / d) + 8: the first 16 values in the low nibbles, the others in the high ones.

    Args:
        weight: (rows, columns), columns divisible by 32.

    Returns:
        uint8, (rows, columns / 32 * 18), on the CPU.
    """
    rows = weight.shape[0]
    blocks = weight.to("cuda" if torch.cuda.is_available() else "cpu").float().view(-1, GGUF_BLOCK)
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scale = largest / -8
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    codes = (blocks * inverse + 8.5).clamp(0, 15).to(torch.uint8)
    half = GGUF_BLOCK // 2
    packed = codes[:, :half] | codes[:, half:] << 4
    return torch.cat([scale.half().view(torch.uint8), packed], dim=1).view(rows, -1).cpu()
