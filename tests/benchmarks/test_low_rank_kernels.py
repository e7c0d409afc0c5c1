"""`benchmarks/low_rank_kernels.py`: what it measures, what it calls wrong, and what its table says."""

import low_rank_kernels as script
import pytest
import torch
from low_rank_kernels import TORCH, TRITON, Row

from flux_nf4.low_rank import beside


def add_by_torch(output, input, down, up, scale):
    """In the kernels' place."""
    output += (input.float() @ down.float().t() * scale) @ up.float().t()


@pytest.fixture
def _on_a_cpu(monkeypatch):
    monkeypatch.setattr(script, "SHAPES", {"proj": (32, 64), "linear1": (48, 64)})
    monkeypatch.setattr(script, "rows_of_pictures", lambda name, pixels: [16, *pixels] if name == "proj" else pixels)
    monkeypatch.setattr(script, "TEXT_TOKENS", 16)
    monkeypatch.setattr(script, "host_us", lambda call: call() or 1.0)
    monkeypatch.setattr(script, "device_ms", lambda call, repeats: call() or 0.5)
    monkeypatch.setattr(script, "copy_gbps", lambda repeats: 1000.0)
    monkeypatch.setattr(script, "in_turn", lambda *shape: iter(lambda: torch.randn(shape).bfloat16(), None))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(beside, "problem_on", lambda device, dtype: None)
    monkeypatch.setattr(beside, "add", add_by_torch)


@pytest.mark.usefixtures("_on_a_cpu")
def test_each_layer_is_measured_at_its_rows():
    with torch.inference_mode():
        found, host = script.measure(16, [20, 40], 1), script.hosts_us(16)
    assert [(row.layer, row.rows) for row in found] == [
        ("proj", 16), ("proj", 20), ("proj", 40), ("linear1", 20), ("linear1", 40)
    ]  # fmt: skip
    assert all(0 < row.errors[way] < 0.01 for row in found for way in (TORCH, TRITON))
    assert not any(row.is_wrong for row in found)
    assert found[0].bytes_ms == pytest.approx((2 * 64 * 32 + 2 * 32 * 48) / 1e9)
    assert host == {TORCH: 1.0, TRITON: 1.0}


@pytest.mark.usefixtures("_on_a_cpu")
def test_wrong_values_and_kernels_that_do_not_work_are_told(monkeypatch):
    with monkeypatch.context() as wrong:
        wrong.setattr(beside, "add", lambda *_: None)
        with torch.inference_mode():
            assert all(row.is_wrong for row in script.measure(16, [20], 1))
    monkeypatch.setattr(beside, "problem_on", lambda device, dtype: "no C compiler")
    with pytest.raises(SystemExit, match="the kernels cannot be used: no C compiler"):
        script.measure(16, [20], 1)
    with pytest.raises(SystemExit, match="the kernels are for ranks up to 16"):
        script.measure(17, [20], 1)


def test_layers_are_summed_as_often_as_a_forward_has_them():
    """38 single blocks; 19 double ones, which have each Linear twice, for the text and for the picture."""
    rows = [("qkv", 512, 2.0, 1.0), ("qkv", 4096, 4.0, 3.0), ("linear1", 4608, 5.0, 4.0)]
    found = [
        Row(name, count, {TORCH: slow, TRITON: fast}, 0.5, {TORCH: 0.003, TRITON: 0.002})
        for name, count, slow, fast in rows
    ]
    lines = script.table(found, [1024]).splitlines()
    assert "| qkv | 512 | 2.0000 | 1.0000 | 0.5000 | 0.00300 | 0.00200 |" in lines
    assert lines[-1] == (
        "1024: a forward's LoRA takes 304.00 ms by torch, 228.00 by Triton, and to move the bytes takes 38.00"
    )
