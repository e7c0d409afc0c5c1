"""The experiment on modulation runs, and both of its models make the same picture (it fails otherwise)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from modulation import Remembered
from torch import nn

ROOT = Path(__file__).parent.parent.parent


def test_a_remembered_layer_computes_once_and_shows_no_weights():
    linear = nn.Linear(4, 4)
    remembered, x = Remembered(linear), torch.randn(1, 4)
    first = remembered(x)
    with torch.no_grad():
        linear.weight.zero_()
    assert torch.equal(remembered(x), first)
    assert list(remembered.parameters()) == []


def test_both_models_run(comfyui, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "modulation.py"), "--dry-run", "--rounds", "1", "--calls", "2"]
    command += ["--folder", str(tmp_path), "--output", str(tmp_path)]
    subprocess.run(command, check=True, timeout=200, env=os.environ | {"COMFYUI_PATH": str(comfyui)})
    results = json.loads((tmp_path / "modulation.json").read_text())
    (row,) = results["rows"]
    assert row["streamed_ms"] > 0
    assert row["remembered_ms"] > 0
    hidden, doubles, singles = 256, 2, 3
    weights = (doubles * 12 + singles * 3) * hidden**2
    assert results["modulation_bytes"] == pytest.approx(weights * 0.5625, rel=0.03)  # and biases
