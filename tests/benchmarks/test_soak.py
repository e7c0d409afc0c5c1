"""The soak sees growth and changed pictures; a small one runs through."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import comfy.model_management
import soak
import streamed
import torch

ROOT = Path(__file__).parent.parent.parent
MIB = 2**20


def done(pixels=64, loras=0, digest="a", file="nf4"):
    prompt = soak.Prompt(file, pixels, loras, 0, 0, unloads_first=False)
    return soak.Done(prompt, digest, 1.0, soak.Memory(0, 0, 0, 0))


def test_growth_is_the_end_against_the_middle():
    rests = [soak.Memory(9 * MIB, 5, 9, 0), soak.Memory(8 * MIB, 5, 10, 3)]
    assert soak.growth(rests) == {"device": -MIB, "allocated": 0, "pinned": 1, "resident": 3}
    assert soak.growth(rests[:1]) == {}


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


def test_memory_at_rest_has_no_model_on_the_device(tiny_files, monkeypatch):
    patcher = streamed.load(tiny_files.nf4())
    prompt = soak.Prompt("nf4", 64, 1, 2, 3, unloads_first=False)
    soak.run({"nf4": patcher}, None, prompt, steps=1, text_tokens=8)
    assert comfy.model_management.current_loaded_models
    monkeypatch.setattr(soak, "memory_of", lambda held: (len(held), list(comfy.model_management.current_loaded_models)))
    assert soak.at_rest(soak.held_by({"nf4": patcher}, None)) == (1, [])


def test_a_small_soak_runs_through(comfyui, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--dry-run", "--prompts", "10", "--steps", "1"]
    command += ["--folder", str(tmp_path), "--output", str(tmp_path)]
    variables = os.environ | {"COMFYUI_PATH": str(comfyui)}
    output = subprocess.run(command, check=True, timeout=200, stdout=subprocess.PIPE, text=True, env=variables).stdout
    assert "10 of 10 prompts" in output
    assert output.endswith("nothing grew, and every picture is bit-equal to the first of its kind\n")
