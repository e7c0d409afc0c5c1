"""A tiny dense Flux to be saved, and the check that a file is what bitsandbytes makes of it."""

import checkpoint_layout as layout
import gguf
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Params4bit

from flux_nf4.nf4_loader.saving.quantise import QuantSettings

HIDDEN = 256
SHAPES = layout.flux(1, 1, guidance=True, hidden=HIDDEN)
WEIGHTS = {name for name, shape in SHAPES.items() if len(shape) == 2}


def values(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).mul_(0.05).to(dtype) for name, shape in SHAPES.items()}


def dequantised(tensors, name):
    """The weight as bitsandbytes' own loader and kernel give it."""
    state = {key: value for key, value in tensors.items() if key.startswith(f"{name}.")}
    read = Params4bit.from_prequantized(tensors[name], state, device="cpu")
    return bnb.dequantize_4bit(read.data, read.quant_state)


def requantised(weight, settings=QuantSettings()):  # noqa: B008  frozen
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type=settings.quant_type, compress_statistics=settings.nested
    )
    return bnb.dequantize_4bit(packed, state)


def check(tensors, expected, settings=QuantSettings()):  # noqa: B008
    """The file holds ``expected``, its weights as bitsandbytes quantises them, and nothing else."""
    assert {name.partition(".weight.")[0].removesuffix(".weight") for name in tensors} == {
        name.removesuffix(".weight") for name in SHAPES
    }
    for name, value in expected.items():
        if name in WEIGHTS:
            assert torch.equal(dequantised(tensors, name), requantised(value, settings)), name
        else:
            assert torch.equal(tensors[name], value), name


def write_gguf(path, kind):
    """`values` as a GGUF file, the weights in ``kind``; returns what they read as."""
    writer = gguf.GGUFWriter(path, "flux")
    expected = {}
    for name, value in values(torch.float32).items():
        if name not in WEIGHTS:
            writer.add_tensor(name, value.numpy())
            expected[name] = value
            continue
        raw = gguf.quants.quantize(value.numpy(), kind)
        writer.add_tensor(name, raw, raw_dtype=kind)
        read = torch.from_numpy(gguf.quants.dequantize(raw, kind).copy())
        expected[name] = read.to(torch.float16 if kind.name == "F16" else torch.bfloat16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected
