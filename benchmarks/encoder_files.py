"""Files of random NF4 weights in the layout of transformers: Mistral 3 as FLUX.2 uses it, and a FLUX.2 transformer."""

import base64
import functools
import json
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

Shapes = Mapping[str, tuple[int, ...]]

_DTYPES = {torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16"}
_BLOCK = 64
_PATTERN_BYTES = 64 << 20


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


def write_random(path: Path, shapes: Shapes) -> Path:
    """Write a file unless it is there: matrices in NF4 with fp32 absmax, but for the embedding; the rest in bf16.

    A matrix keeps the size of what goes through it. All random numbers are from 64 MiB of them, of which each tensor
    begins at another place, and several threads write: to make all of 30 GB took longer than what is measured.
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
    unfinished = path.with_suffix(".part")
    begins = [8 + len(header) + entry["data_offsets"][0] for entry in entries.values()]  # type: ignore[index]
    with unfinished.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(file.tell() + position)
    with ThreadPoolExecutor() as writers:
        list(writers.map(functools.partial(_write, unfinished), begins, _contents(shapes)))
    unfinished.rename(path)
    return path


def _write(path: Path, begin: int, content: "_Content") -> None:
    with path.open("r+b") as file:
        file.seek(begin)
        pattern = content.pattern.view(torch.uint8).numpy().data
        place, left = begin // 64 * 64 % len(pattern) if content.is_random else 0, content.nbytes
        while left:
            written = file.write(pattern[place : place + left])
            place, left = 0, left - written


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


class _Content(NamedTuple):
    """``nbytes`` of ``pattern`` (1-dimensional), as often as they take: from its beginning, or from any place in it."""

    nbytes: int
    pattern: torch.Tensor
    is_random: bool = False


def _contents(shapes: Shapes) -> Iterator[_Content]:
    """Of the tensors, in the order of `_entries`."""
    from flux_nf4.nf4_loader.checkpoint.quant_state import CODES

    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (_PATTERN_BYTES,), dtype=torch.uint8, generator=generator)
    values = torch.randn(_PATTERN_BYTES // 2, generator=generator).bfloat16()
    ones, quant_map = torch.ones(_BLOCK, dtype=torch.bfloat16), torch.tensor(CODES["nf4"])
    for name, shape in shapes.items():
        numel = math.prod(shape)
        if not _is_packed(name, shape):
            is_norm = len(shape) == 1
            yield _Content(2 * numel, ones if is_norm else values, not is_norm)
            continue
        absmax, state = torch.full((1 << 20,), 1.7 / math.sqrt(shape[1])), bytearray(_state(shape))
        yield _Content(numel // 2, codes, True)
        yield _Content(4 * (numel // _BLOCK), absmax)
        yield _Content(quant_map.nbytes, quant_map)
        yield _Content(len(state), torch.frombuffer(state, dtype=torch.uint8))
