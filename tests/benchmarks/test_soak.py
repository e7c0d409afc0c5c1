"""The soak sees growth and changed pictures; a small one runs through."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import soak
import streamed
import torch

ROOT = Path(__file__).parent.parent.parent
MIB = 2**20


def done(pixels=64, loras=0, digest="a", device=0, allocated=0, pinned=0, resident=0, file="nf4"):
    prompt = soak.Prompt(file, pixels, loras, 0, 0, unloads_first=False)
    return soak.Done(prompt, digest, 1.0, soak.Memory(device, allocated, pinned, resident))


def test_growth_is_the_second_half_against_the_first():
    run = [done(device=5 * MIB, pinned=9), done(device=9 * MIB), done(device=8 * MIB, resident=3), done(pinned=10)]
    assert soak.growth(run) == {"device": -MIB, "allocated": 0, "pinned": 1, "resident": 3}


def test_a_picture_that_is_not_the_first_of_its_file_size_and_loras_is_found():
    run = [done(), done(pixels=96, digest="b"), done(), done(loras=1, digest="c"), done(digest="b"), done(loras=1)]
    run += [done(file="int8", digest="d"), done(file="int8")]
    assert soak.other_pictures(run) == [4, 5, 7]


def test_prompts_differ_in_everything_and_are_the_same_each_time():
    drawn = soak.prompts(200, ["nf4", "nested"], is_tiny=False)
    assert drawn == soak.prompts(200, ["nf4", "nested"], is_tiny=False)
    for field in ("file", "pixels", "loras", "double", "unloads_first"):
        assert len({getattr(prompt, field) for prompt in drawn}) > 1
    encoding = soak.prompts(200, ["nf4", "nested"], is_tiny=False, encodes=True)
    assert {prompt.encoder_gib for prompt in encoding} == {0.0, 1.0, 3.0}
    assert [dataclasses.replace(prompt, encoder_gib=None) for prompt in encoding] == drawn


def test_an_encoding_that_is_another_one_is_found(tiny_files, monkeypatch):
    class Noise:
        """Its second encoding differs from the first."""

        def __init__(self, patcher):
            self.patcher, self.budgets = patcher, []

        def encode(self, budget_gib):
            self.budgets.append(budget_gib)
            return torch.full((2,), min(len(self.budgets), 2.0))

    patchers = {"nf4": streamed.load(tiny_files.nf4())}
    noise = Noise(patchers["nf4"])
    prompt = soak.Prompt("nf4", 64, 0, 0, 0, unloads_first=False, encoder_gib=0.5)
    monkeypatch.setattr(soak, "memory_of", lambda held: soak.Memory(0, 0, len(held), 0))
    run = [soak.run(patchers, noise, prompt, steps=1, text_tokens=8) for _ in range(3)]
    assert noise.budgets == [0.5] * 3
    assert soak.other_pictures(run) == [1, 2]
    assert run[0].memory.pinned == 2  # the encoder's memory is counted


def test_a_small_soak_runs_through(comfyui, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--dry-run", "--prompts", "10", "--steps", "1"]
    command += ["--folder", str(tmp_path), "--output", str(tmp_path)]
    variables = os.environ | {"COMFYUI_PATH": str(comfyui)}
    output = subprocess.run(command, check=True, timeout=200, stdout=subprocess.PIPE, text=True, env=variables).stdout
    assert "10 of 10 prompts" in output
    assert output.endswith("nothing grew, and every picture is bit-equal to the first of its kind\n")
