"""Makes a checkpoint of the real size that takes no room: header and quant states are there, the weights are a hole.

For what looks at a file's header only: every weight reads as zero.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import checkpoint_layout as layout

_BITS = {"U8": 8, "F8_E4M3": 8, "F16": 16, "BF16": 16, "F32": 32}
_Tensor = tuple[str, str, tuple[int, ...], bytes]
"""Name, dtype, shape, and the bytes that it begins with."""


def make_sparse_checkpoint(
    path: Path,
    *,
    double_blocks: int = 19,
    single_blocks: int = 38,
    t5_layers: int = 24,
    is_all_in_one: bool = True,
    is_4bit: bool = True,
) -> None:
    """Write a Flux.1-dev in the v2 layout, or in dense bf16; without ``is_all_in_one`` its transformer only."""
    transformer = layout.flux(double_blocks, single_blocks, guidance=True)
    prefix = "model.diffusion_model."
    tensors = [*_in_4bit(prefix, transformer)] if is_4bit else _dense(prefix, transformer, "BF16")
    if is_all_in_one:
        tensors += _dense("text_encoders.clip_l.", layout.clip_l(), "F16")
        tensors += _dense("text_encoders.t5xxl.", layout.t5_xxl(t5_layers), "F8_E4M3")
        tensors += _dense("vae.", layout.vae(), "BF16")
    header: dict[str, dict[str, object]] = {}
    end = 0
    for name, dtype, shape, _ in tensors:
        begin, end = end, end + math.prod(shape) * _BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        start = file.tell()
        for name, *_, beginning in tensors:
            if beginning:
                file.seek(start + header[name]["data_offsets"][0])  # type: ignore[index]
                file.write(beginning)
        file.truncate(start + end)


def _in_4bit(prefix: str, shapes: layout.Shapes) -> Iterator[_Tensor]:
    for name, shape in shapes.items():
        if len(shape) != 2:
            yield prefix + name, "BF16", shape, b""
            continue
        numel = math.prod(shape)
        fields = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(shape)}
        state = json.dumps(fields).encode()
        yield prefix + name, "U8", ((numel + 1) // 2, 1), b""
        yield f"{prefix}{name}.absmax", "F32", (-(-numel // 64),), b""
        yield f"{prefix}{name}.quant_map", "F32", (16,), b""
        yield f"{prefix}{name}.quant_state.bitsandbytes__nf4", "U8", (len(state),), state


def _dense(prefix: str, shapes: layout.Shapes, dtype: str) -> list[_Tensor]:
    return [(prefix + name, dtype, shape, b"") for name, shape in shapes.items()]
