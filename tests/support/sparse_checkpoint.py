"""Files in the real layout that take no room: a header and the quant states, over a body of holes."""

import json
import math

import torch

from flux_nf4.nf4_loader.quant_state import CODES

SIZES = {"U8": 1, "F8_E4M3": 1, "F16": 2, "BF16": 2, "F32": 4}


def packed_tensors(name, shape, quant_type, blocksize):
    """What bitsandbytes writes for one weight of logical ``shape``, as name -> (dtype, shape, bytes or None)."""
    numel = math.prod(shape)
    state = {"quant_type": quant_type, "blocksize": blocksize, "dtype": "bfloat16", "shape": list(shape)}
    raw = json.dumps(state).encode()
    return {
        name: ("U8", ((numel + 1) // 2, 1), None),
        f"{name}.absmax": ("F32", (-(-numel // blocksize),), None),
        f"{name}.quant_map": ("F32", (16,), torch.tensor(CODES[quant_type]).numpy().tobytes()),
        f"{name}.quant_state.bitsandbytes__{quant_type}": ("U8", (len(raw),), raw),
    }


def write_sparse(path, tensors):
    """A safetensors file of ``tensors`` (name -> (dtype, shape, bytes or None)); where there are no bytes, a hole."""
    entries, content, position = {}, {}, 0
    for name, (dtype, shape, raw) in tensors.items():
        nbytes = SIZES[dtype] * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        content[position] = raw or b""
        position += nbytes
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        start = file.tell()
        for offset, raw in content.items():
            file.seek(start + offset)
            file.write(raw)
        file.truncate(start + position)
