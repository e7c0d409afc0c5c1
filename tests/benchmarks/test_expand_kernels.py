"""`benchmarks/expand_kernels.py`: what it refuses, and what its tables say."""

from itertools import cycle

import expand_kernels
import pytest
import torch
from expand_kernels import BNB, COPY, FILL, TRITON, WAYS, Pair, Row

from flux_nf4.nf4_loader.checkpoint.quant_state import QuantState
from flux_nf4.nf4_loader.linear import by_table, expanded_weight


def weight(blocks):
    """All pairs of codes, and one factor for each block of 64."""
    packed = torch.arange(32 * blocks).to(torch.uint8)
    absmax = torch.rand(blocks, generator=torch.Generator().manual_seed(0)) + 0.01
    return packed, absmax, QuantState("nf4", 64, (blocks, 64))


@pytest.fixture
def _on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(expanded_weight, "problem_on", lambda device, dtype: None)
    monkeypatch.setattr(expanded_weight, "_launch", lambda p, a, tables, *rest: by_table.dequantise(p, a, *rest))
    monkeypatch.setattr(expand_kernels, "SHAPES", {"proj": (8, 64), "qkv": (24, 64)})
    monkeypatch.setattr(expand_kernels, "cold", lambda shape: cycle([weight(shape[0])]))
    monkeypatch.setattr(expand_kernels, "plain_ways", lambda nbytes: dict.fromkeys((COPY, FILL)))
    monkeypatch.setattr(expand_kernels, "device_ms", lambda call, *_: 0.001)


@pytest.mark.usefixtures("_on_a_cpu")
def test_each_shape_is_measured_in_each_way():
    found = expand_kernels.measure(1)
    assert [(row.layer, row.way) for row in found] == [(name, way) for name in ("proj", "qkv") for way in WAYS]
    moved = {"proj": 8 * (32 + 4 + 128), "qkv": 24 * (32 + 4 + 128)}
    assert all(row.gbps == pytest.approx(moved[row.layer] / 1000) for row in found)


@pytest.mark.usefixtures("_on_a_cpu")
def test_other_bits_and_a_kernel_that_does_not_work_end_it(monkeypatch):
    with monkeypatch.context() as wrong:
        wrong.setattr(expanded_weight, "_launch", lambda p, a, tables, *rest: 2 * by_table.dequantise(p, a, *rest))
        with pytest.raises(SystemExit, match="proj: other bits than bitsandbytes"):
            expand_kernels.measure(1)
    monkeypatch.setattr(expanded_weight, "problem_on", lambda device, dtype: "no C compiler")
    with pytest.raises(SystemExit, match="the kernel cannot be used: no C compiler"):
        expand_kernels.measure(1)


def test_what_a_forward_gains_is_said(monkeypatch):
    """38 single blocks, and 38 halves of double ones."""
    monkeypatch.setattr(expand_kernels, "SHAPES", {"qkv": (), "linear1": ()})
    ms = {BNB: (0.5, 0.5), TRITON: (0.2, 0.25), COPY: (0.125, 0.125), FILL: (0.1, 0.1)}
    found = [
        Row(name, way, own[index], 1000.0) for index, name in enumerate(("qkv", "linear1")) for way, own in ms.items()
    ]
    *lines, last = expand_kernels.table(found).splitlines()
    assert last == (
        "a forward takes 20.90 ms less, of 38.00 ms that bitsandbytes takes to expand; at the speed of a copy it takes "
        "28.50 ms less"
    )
    assert "| Triton | 0.2000 (1000) | 0.2500 (1000) | 17.10 |" in lines


def test_pairs_are_summed_as_often_as_a_forward_has_them():
    """38 single blocks; 19 double ones, which have each Linear twice, for the text and for the picture."""
    pairs = [
        Pair(1024, "qkv", 512, 2.0, 1.0),
        Pair(1024, "qkv", 4096, 4.0, 3.5),
        Pair(1024, "linear1", 4608, 5.0, 4.75),
        Pair(512, "linear1", 1536, 2.0, 2.5),
    ]
    lines = expand_kernels.table_of_pairs(pairs).splitlines()
    assert "| 1024 | qkv | 512 | 2.0000 | 1.0000 | 0.500 |" in lines
    assert lines[-2:] == [
        "1024: all Linears of a forward take 38.00 ms less, 12.5 % of 304.0 ms",
        "512: all Linears of a forward take -19.00 ms less, -25.0 % of 76.0 ms",
    ]
