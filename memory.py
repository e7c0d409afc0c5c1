"""Bytes of memory: their units, and the one notion of having run out of them."""

import torch

MIB = 1 << 20
GIB = 1 << 30


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device had too little memory. Not every backend raises torch's own class: some only say so."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
