"""What `benchmarks/int8.py` tries beside the package: a matmul, and settings of the weight kernel."""

import importlib

import pytest
import torch


@pytest.fixture
def matmul(monkeypatch):
    """`int8_matmul`, with its kernel interpreted."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    importlib.reload(importlib.import_module("matmul_kernel"))
    return importlib.reload(importlib.import_module("int8_matmul"))


@pytest.mark.parametrize("rows", [64, 200, 700], ids=["whole tiles", "a part of one", "more than a band"])
def test_the_matmul_is_exact_but_for_the_last_rounding(matmul, rows):
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randint(-127, 128, (n, 128), dtype=torch.int8, generator=generator) for n in (rows, 128))
    x_scale, w_scale = (torch.rand(n, generator=generator) / 100 for n in (rows, 128))
    bias = torch.randn(128, generator=generator).half()
    found = matmul.matmul(x, x_scale, w, w_scale, bias, (64, 64, 64, 4, 2))
    expected = (x.int() @ w.int().t()) * x_scale[:, None] * w_scale + bias.float()
    torch.testing.assert_close(found, expected.half(), rtol=2e-3, atol=2e-3)


def test_its_table_says_what_a_forward_would_gain(matmul):
    row = {"pixels": 1024, "rows": 4608, "kitchen_ms": 1.0, "setting": (1,), "weight_ms": 0.1, "input_ms": 0.1}
    slower = row | {"layer": "linear2", "exact_ms": 1.0, "triton_ms": 2.0}
    lines = matmul.table([row | {"layer": "linear1", "exact_ms": 1.0, "triton_ms": 0.75}, slower]).splitlines()
    for line, taken in zip(lines[-2:], ("linear1", "all layers"), strict=True):
        assert line.startswith(f"1024: {taken} by Triton would take 9.50 ms less a forward, 12.5 % of the 76.0 ms")


def test_the_settings_are_summed_and_one_that_fails_is_told(monkeypatch):
    tuning = importlib.import_module("int8_tuning")
    monkeypatch.setattr(tuning, "SHAPES", {"qkv": (), "proj": ()})
    monkeypatch.setattr(tuning, "SETTINGS", ((8, 4), (16, 4)))
    found = [{"layer": name, "setting": (8, 4), "ms": 0.25, "ratio": r} for name, r in (("qkv", 1.2), ("proj", 1.1))]
    found += [{"layer": "qkv", "setting": (16, 4), "problem": "wrong values: error 0.5"}]
    found += [{"layer": "proj", "setting": (16, 4), "ms": 0.1, "ratio": 0.5}]
    *_, first, second = tuning.table(found).splitlines()
    assert first == "(8, 4): 0.5000 ms for one layer of each kind, at most 1.20 of bitsandbytes"
    assert second == "(16, 4): cannot be used"
