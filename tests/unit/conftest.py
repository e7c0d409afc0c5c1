"""What the tests share: 4-bit weights as bitsandbytes makes them, files with any header, RAM, the log."""

import json
import logging
import os
import weakref

import pytest
import torch
from bitsandbytes import functional as bnb
from blocks_of_a_file import ALL

from flux_nf4.nf4_loader.checkpoint.quant_state import NestedAbsmax, QuantState
from flux_nf4.nf4_loader.linear.linear4bit import Linear4bit
from flux_nf4.offload import file_arena, pinning
from flux_nf4.offload.arena import PAGE
from flux_nf4.offload.pinning import pinned_by_all


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
def quantised_layer(quantise):
    """A function: a `Linear4bit` with what `quantise` gives; the values of its bias are not set."""

    def make(shape, quant_type="nf4", blocksize=64, nested=False, bias=True, dtype=torch.bfloat16):
        packed, state = quantise(shape, quant_type, blocksize, nested)
        second = (NestedAbsmax(state.absmax.numel(), 256),) if nested else ()
        layer = Linear4bit([QuantState(quant_type, blocksize, shape, second)], bias=bias, dtype=dtype)
        layer.packed_0.copy_(packed.view(-1))
        layer.absmax_0.copy_(state.absmax)
        if nested:
            layer.nested_absmax_0.copy_(state.state2.absmax)
            layer.nested_map_0.copy_(state.state2.code)
            layer.nested_offset_0.copy_(state.offset)
        return layer

    return make


@pytest.fixture
def file(tmp_path):
    """Of random bytes, as many as `arena_of` wants."""
    path = tmp_path / "flux.safetensors"
    path.write_bytes(os.urandom(2 * ALL))
    return path


@pytest.fixture
def ram(monkeypatch):
    """A function: so many bytes may be pinned of files. Nobody else pins."""
    monkeypatch.setattr(pinning, "_all_pins", weakref.WeakSet())
    monkeypatch.setattr(file_arena, "ram_bytes", lambda: 16 * PAGE)

    def set_to(nbytes):
        monkeypatch.setattr(file_arena, "free_ram_bytes", lambda: nbytes + PAGE + pinned_by_all(read_only=True))

    set_to(1 << 40)
    return set_to


@pytest.fixture
def messages(caplog):
    """A function: what the log has said, with the level, since the last call."""
    caplog.set_level(logging.INFO)

    def take():
        taken = [(record.levelname, record.getMessage()) for record in caplog.records]
        caplog.clear()
        return taken

    return take


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
