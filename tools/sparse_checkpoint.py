"""Makes a checkpoint of the real size that takes no room: header and quant states are there, the weights are a hole.

For what looks at a file's header only: every weight reads as zero.
"""

import json
import math
from pathlib import Path

import checkpoint_layout as layout
from sparse_file import Tensor, write_sparse


def make_sparse_checkpoint(
    path: Path,
    *,
    double_blocks: int = 19,
    single_blocks: int = 38,
    t5_layers: int = 24,
    hidden: int = 3072,
    t5: int = 4096,
    clip_l: int = 768,
    is_all_in_one: bool = True,
    is_4bit: bool = True,
) -> None:
    """Write a Flux.1-dev in the v2 layout, or in dense bf16; without ``is_all_in_one`` its transformer only.

    ``hidden``, ``t5`` and ``clip_l`` are the widths of transformer and text encoders.
    """
    transformer = layout.flux(double_blocks, single_blocks, guidance=True, hidden=hidden, t5=t5, clip_l=clip_l)
    prefix = "model.diffusion_model."
    tensors = _in_4bit(prefix, transformer) if is_4bit else _dense(prefix, transformer, "BF16")
    if is_all_in_one:
        tensors |= _dense("text_encoders.clip_l.", layout.clip_l(clip_l), "F16")
        tensors |= _dense("text_encoders.t5xxl.", layout.t5_xxl(t5_layers, t5), "F8_E4M3")
        tensors |= _dense("vae.", layout.vae(), "BF16")
    write_sparse(path, tensors)


def make_sparse_shards(first: Path, shapes: layout.Shapes) -> None:
    """Write tensors of these names and shapes, those of two dimensions as weights in NF4, into the shards of which
    ``first`` (``...-00001-of-0000n.safetensors``, or one whole file) is the first."""
    tensors = list(_in_4bit("", shapes).items())
    count = int(first.stem.rpartition("-of-")[2]) if "-of-" in first.stem else 1
    for number in range(count):
        shard = first.with_name(first.name.replace("-00001-of-", f"-{number + 1:05}-of-"))
        write_sparse(shard, dict(tensors[number::count]))


def _in_4bit(prefix: str, shapes: layout.Shapes) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if len(shape) != 2:
            tensors[prefix + name] = ("BF16", shape, None)
            continue
        numel = math.prod(shape)
        fields = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(shape)}
        state = json.dumps(fields).encode()
        tensors[prefix + name] = ("U8", ((numel + 1) // 2, 1), None)
        tensors[f"{prefix}{name}.absmax"] = ("F32", (-(-numel // 64),), None)
        tensors[f"{prefix}{name}.quant_map"] = ("F32", (16,), None)
        tensors[f"{prefix}{name}.quant_state.bitsandbytes__nf4"] = ("U8", (len(state),), state)
    return tensors


def _dense(prefix: str, shapes: layout.Shapes, dtype: str) -> dict[str, Tensor]:
    return {prefix + name: (dtype, shape, None) for name, shape in shapes.items()}


def make_sparse_int8(
    path: Path,
    *,
    double_blocks: int = 19,
    single_blocks: int = 38,
    hidden: int = 3072,
    t5: int = 4096,
    clip_l: int = 768,
) -> None:
    """Write the transformer of a Flux.1-dev in ComfyUI's INT8 ConvRot: the blocks' matrices, the rest in bf16."""
    said = json.dumps({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}).encode()
    tensors: dict[str, Tensor] = {}
    for name, shape in layout.flux(
        double_blocks, single_blocks, guidance=True, hidden=hidden, t5=t5, clip_l=clip_l
    ).items():
        if len(shape) != 2 or "_blocks." not in name:
            tensors[name] = ("BF16", shape, None)
            continue
        tensors[name] = ("I8", shape, None)
        tensors[f"{name}_scale"] = ("F32", (shape[0], 1), None)
        tensors[name.removesuffix("weight") + "comfy_quant"] = ("U8", (len(said),), said)
    write_sparse(path, tensors)
