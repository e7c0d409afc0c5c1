"""Files of random NF4 weights in the layout of transformers: Mistral 3 as FLUX.2 uses it, and a FLUX.2 transformer."""

import base64
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

Shapes = Mapping[str, tuple[int, ...]]

_DTYPES = {torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16"}
_BLOCK = 64


def mistral3(*, layers: int, heads: int, kv_heads: int, intermediate: int, vocabulary: int) -> Shapes:
    """Of hidden size 5120 and heads of 128, as in the real one."""
    hidden, prefix = 5120, "language_model.model."
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}embed_tokens.weight": (vocabulary, hidden)}
    for index in range(layers):
        layer = f"{prefix}layers.{index}."
        for name, rows in (("q", 128 * heads), ("k", 128 * kv_heads), ("v", 128 * kv_heads)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (rows, hidden)
        shapes[f"{layer}self_attn.o_proj.weight"] = (hidden, 128 * heads)
        for name in ("gate", "up"):
            shapes[f"{layer}mlp.{name}_proj.weight"] = (intermediate, hidden)
        shapes[f"{layer}mlp.down_proj.weight"] = (hidden, intermediate)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{name}.weight"] = (hidden,)
    return shapes | {f"{prefix}norm.weight": (hidden,)}


def flux2(*, hidden: int, double: int, single: int, context: int = 15360) -> Shapes:
    """By the names of ComfyUI's model. Its MLPs are gated, three times as wide as ``hidden``; there is no bias."""
    mlp = 3 * hidden
    shapes: dict[str, tuple[int, ...]] = {"img_in.weight": (hidden, 128), "txt_in.weight": (hidden, context)}
    for name in ("time_in", "guidance_in"):
        shapes |= {f"{name}.in_layer.weight": (hidden, 256), f"{name}.out_layer.weight": (hidden, hidden)}
    for name, parts in (("double_stream_modulation_img", 6), ("double_stream_modulation_txt", 6)):
        shapes[f"{name}.lin.weight"] = (parts * hidden, hidden)
    shapes["single_stream_modulation.lin.weight"] = (3 * hidden, hidden)
    for index in range(double):
        for stream in ("img", "txt"):
            block = f"double_blocks.{index}.{stream}_"
            shapes |= {f"{block}attn.qkv.weight": (3 * hidden, hidden), f"{block}attn.proj.weight": (hidden, hidden)}
            shapes |= {f"{block}attn.norm.{part}_norm.scale": (128,) for part in ("query", "key")}
            shapes |= {f"{block}mlp.0.weight": (2 * mlp, hidden), f"{block}mlp.2.weight": (hidden, mlp)}
    for index in range(single):
        block = f"single_blocks.{index}."
        shapes[f"{block}linear1.weight"] = (3 * hidden + 2 * mlp, hidden)
        shapes[f"{block}linear2.weight"] = (hidden, hidden + mlp)
        shapes |= {f"{block}norm.{part}_norm.scale": (128,) for part in ("query", "key")}
    return shapes | {
        "final_layer.adaLN_modulation.1.weight": (2 * hidden, hidden),
        "final_layer.linear.weight": (128, hidden),
    }


def write_random(path: Path, shapes: Shapes, device: torch.device) -> Path:
    """Write a file unless it is there: matrices in NF4 with fp32 absmax, but for the embedding; the rest in bf16.

    A matrix keeps the size of what goes through it. The numbers are made on ``device``.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    entries: dict[str, object] = {}
    position = 0
    for name, dtype, shape in _entries(shapes):
        end = position + dtype.itemsize * math.prod(shape)
        entries[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 64 + 56)  # so that every tensor begins where its values may
    generator = torch.Generator(device).manual_seed(0)
    unfinished = path.with_suffix(".part")
    with unfinished.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in _tensors(shapes, generator, device):
            file.write(tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes())
    unfinished.rename(path)
    return path


def tekken() -> bytes:
    """A tokenizer in the format of Mistral's, whose only ordinary tokens are the 256 bytes."""
    special = [{"rank": rank, "token_str": f"<{rank}>"} for rank in range(20)]
    vocab = [{"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode()} for byte in range(256)]
    config = {"default_vocab_size": 276, "default_num_special_tokens": 20}
    return json.dumps({"config": config, "vocab": vocab, "special_tokens": special}).encode()


def _is_packed(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and "embed_tokens" not in name


def _state(shape: tuple[int, ...]) -> bytes:
    state = {"quant_type": "nf4", "blocksize": _BLOCK, "dtype": "bfloat16", "shape": list(shape)}
    return json.dumps(state).ljust(96).encode()


def _entries(shapes: Shapes) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    for name, shape in shapes.items():
        numel = math.prod(shape)
        if not _is_packed(name, shape):
            yield name, torch.bfloat16, shape
            continue
        yield name, torch.uint8, (numel // 2, 1)
        yield f"{name}.absmax", torch.float32, (numel // _BLOCK,)
        yield f"{name}.quant_map", torch.float32, (16,)
        yield f"{name}.quant_state.bitsandbytes__nf4", torch.uint8, (len(_state(shape)),)


def _tensors(shapes: Shapes, generator: torch.Generator, device: torch.device) -> Iterator[torch.Tensor]:
    from flux_nf4.nf4_loader.checkpoint.quant_state import CODES

    for name, shape in shapes.items():
        numel = math.prod(shape)
        if not _is_packed(name, shape):
            is_norm = len(shape) == 1
            values = torch.ones(shape) if is_norm else torch.randn(shape, generator=generator, device=device)
            yield values.bfloat16()
            continue
        yield torch.randint(0, 256, (numel // 2,), dtype=torch.uint8, generator=generator, device=device)
        yield torch.full((numel // _BLOCK,), 1.7 / math.sqrt(shape[1]))
        yield torch.tensor(CODES["nf4"])
        yield torch.frombuffer(bytearray(_state(shape)), dtype=torch.uint8)
