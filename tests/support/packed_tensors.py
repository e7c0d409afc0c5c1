"""What bitsandbytes writes for a weight, without the weight."""

import json
import math

import torch

from flux_nf4.nf4_loader.checkpoint.quant_state import CODES


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
