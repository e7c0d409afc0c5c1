"""What the tests of nf4_loader share: 4-bit weights as bitsandbytes makes them, and files with any header."""

import json

import pytest
import torch
from bitsandbytes import functional as bnb


@pytest.fixture
def write_safetensors(tmp_path):
    """A function that writes a header (a JSON value, or raw bytes) and data as they are, checked by nobody."""

    def write(header, data=b""):
        raw = header if isinstance(header, bytes) else json.dumps(header).encode()
        path = tmp_path / "flux.safetensors"
        path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
        return path

    return write


@pytest.fixture(scope="session")
def quantise():
    """A function that quantises a random weight: the packed bytes and bitsandbytes' quant state.

    The quant state is for the flat weight, for ``bnb.dequantize_4bit`` on the CPU takes every row of a 2-D one to
    begin a block, which is not so where the row is no whole number of blocks.
    """

    def quantise(shape, quant_type="nf4", blocksize=64, nested=False, dtype=torch.float32):
        generator = torch.Generator().manual_seed(shape[0] * 10_007 + shape[1])
        weight = torch.randn(shape, generator=generator).to(dtype)
        packed, state = bnb.quantize_4bit(weight.view(-1), None, None, blocksize, nested, quant_type)
        return packed, state

    return quantise


@pytest.fixture(scope="session")
def reference():
    """A function that dequantises as bitsandbytes does, to the logical shape and dtype."""

    def dequantise(packed, state, shape, dtype):
        state.dtype = dtype
        # bitsandbytes compiles its generic kernel anew for each shape; uncompiled, it gives the same bits.
        with torch.compiler.set_stance("force_eager"):
            return bnb.dequantize_4bit(packed, state).view(shape)

    return dequantise


@pytest.fixture(scope="session")
def fp32_absmax():
    """A function that gives a quant state's absmax in fp32, as bitsandbytes expands it."""

    def expand(state):
        if not state.nested:
            return state.absmax
        return bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset

    return expand
