"""Quantising: bit for bit what bitsandbytes makes of the whole weight."""

import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Params4bit

from flux_nf4.nf4_loader.saving import quantise as module
from flux_nf4.nf4_loader.saving.quantise import QuantSettings, quantise


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(96, 128), (7, 65), (64, 4096)], ids=str)
@pytest.mark.parametrize("blocksize", [64, 128])
def test_the_bits_are_those_of_bitsandbytes(quant_type, nested, dtype, shape, blocksize, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 4096)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed, state = bnb.quantize_4bit(weight, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested)
    wanted = {"": packed} | {f".{key}": value for key, value in state.as_dict(packed=True).items()}
    made = quantise(weight, QuantSettings(quant_type, nested, blocksize))
    assert made.keys() == wanted.keys()
    for end, tensor in made.items():
        assert tensor.dtype == wanted[end].dtype, end
        assert torch.equal(tensor, wanted[end]), end


def test_bitsandbytes_reads_it_back():
    weight = torch.randn(64, 256).bfloat16()
    made = quantise(weight, QuantSettings(nested=True))
    stats = {f"weight{end}": tensor for end, tensor in made.items() if end}
    read = Params4bit.from_prequantized(made[""], stats, device="cpu")
    whole, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert torch.equal(bnb.dequantize_4bit(read.data, read.quant_state), bnb.dequantize_4bit(whole, state))
