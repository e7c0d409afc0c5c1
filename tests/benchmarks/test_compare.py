"""The comparison, small and on the CPU: who has the same weights makes the same picture, and who breaks is reported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import streamed
from cases import TINY_CASES
from comfy_model import with_lora
from contenders import CONTENDERS, Options, family_maker
from family import Unavailable
from random_lora import diffusers, kohya, linear_shapes
from turn import Effort, take_turn
from weights import Files
from worker import Failure, Request, Worker

ROOT = Path(__file__).parent.parent.parent
COMPARED = ("bnb-nf4", "bnb-nf4-moved-7-7", "streamed-0-0", "comfy-bf16", "gguf-q4")
CASES = {case.name: case for case in TINY_CASES}


@pytest.mark.parametrize("case", ["tiny", "tiny-steps-cfg"])
def test_contenders_with_the_same_weights_make_the_same_picture(case, tiny_files, tmp_path):
    figures = {}
    for name in ("bnb-nf4", "bnb-nf4-moved-7-7", "streamed-0-0", "streamed-auto", "comfy-bf16"):
        contender = next(one for one in CONTENDERS if one.name == name)
        family = family_maker(contender.family, Options(tiny_files))()
        figures[name] = take_turn(family, contender.setting, name, CASES[case], Effort(2, 0.01), tmp_path)
    differences = {name: figures.pop(name).difference for name in list(figures)}
    assert differences.pop("bnb-nf4") is None
    assert 0 < differences.pop("comfy-bf16").relative_error < 0.02
    for difference in differences.values():
        assert (difference.compared_with, difference.is_equal, difference.relative_error) == ("bnb-nf4", True, 0.0)


def test_contenders_with_nested_absmax_make_one_picture(tiny_files, tmp_path):
    figures = {}
    for name in ("bnb-nf4-v1", "streamed-v1-0-0", "streamed-v1-resident-compiled"):
        contender = next(one for one in CONTENDERS if one.name == name)
        family = family_maker(contender.family, Options(tiny_files))()
        setting = contender.setting.replace("19/38", "2/3")
        figures[name] = take_turn(family, setting, name, CASES["tiny"], Effort(2, 0.01), tmp_path)
    assert tiny_files.nf4(nested=True).stat().st_size < tiny_files.nf4().stat().st_size
    assert figures.pop("bnb-nf4-v1").difference is None
    for turn in figures.values():
        assert (turn.difference.compared_with, turn.difference.is_equal) == ("bnb-nf4-v1", True)


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_a_lora_that_is_left_out_in_part_is_not_timed(layout, tiny_files):
    patcher = streamed.load(tiny_files.nf4())
    shapes, config = linear_shapes(patcher.model), patcher.model.model_config.unet_config
    file = kohya(shapes) if layout == "kohya" else diffusers(config, shapes)
    assert with_lora(with_lora(patcher, file, 1.0), file, 0.5).patches
    name = next(name for name in file if name.endswith(("lora_up.weight", "lora_B.weight")))
    file[name] = file[name][:-16]
    with pytest.raises(ValueError, match=r"^\d+ of the LoRA's \d+ patches fit the model$"):
        with_lora(patcher, file, 1.0)


def test_a_turn_is_timed(tiny_files, tmp_path):
    family = family_maker("streamed", Options(tiny_files))()
    calls = take_turn(family, "0/0", "x", CASES["tiny"], Effort(3, 60), tmp_path)
    assert (len(calls.ms), calls.sampling_s) == (3, [])
    steps = take_turn(family, "0/0", "x", CASES["tiny-steps-cfg"], Effort(3, 0.01), tmp_path)
    assert len(steps.ms) == len(steps.sampling_s) * (CASES["tiny-steps-cfg"].steps - 1)
    assert min(*calls.ms, *steps.ms, *steps.sampling_s, calls.load_s, calls.first_call_s) > 0
    assert calls.resident > 0


def test_a_contender_that_needs_what_is_not_here_says_so(tiny_files):
    with pytest.raises(Unavailable, match="needs a copy of city96/ComfyUI-GGUF"):
        family_maker("gguf", Options(tiny_files))()


def test_a_process_takes_turns_and_reports_what_breaks(comfyui, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui))
    worker = Worker("streamed", Options(Files(tiny_folder, is_tiny=True)), tmp_path / "log")
    try:
        for setting in ("0/0", "nonsense", "0/0"):
            request = Request(setting, "streamed", CASES["tiny"], Effort(2, 0.01), tmp_path)
            answer = worker.ask(request, timeout_s=200)
            if setting == "nonsense":
                assert answer == Failure("ValueError: invalid literal for int() with base 10: 'nonsense'", False)
            else:
                assert len(answer.ms) == 2, answer
                assert worker.loaded.resident > worker.loaded.resident_before > 0
    finally:
        worker.stop()


@pytest.mark.slow
def test_the_whole_comparison_runs(comfyui, tmp_path):
    """Each family in a process of its own; the copy of ComfyUI-GGUF that is given is no such thing."""
    (tmp_path / "nodes.py").write_text("raise RuntimeError('no node pack')")
    command = [sys.executable, str(ROOT / "benchmarks" / "compare.py"), "--dry-run", "--rounds", "2", "--calls", "2"]
    command += ["--seconds", "0.1", "--folder", str(tmp_path / "weights"), "--output", str(tmp_path / "results")]
    command += ["--gguf-pack", str(tmp_path), "--cases", "tiny", "tiny-steps-cfg", "--only", *COMPARED]
    subprocess.run(command, check=True, timeout=600, env=os.environ | {"COMFYUI_PATH": str(comfyui)})
    rows = json.loads((tmp_path / "results" / "compare.json").read_text())["rows"]
    assert (tmp_path / "results" / "compare.md").read_text().count("\n## ") == 3
    assert len(rows) == 10
    for row in rows:
        if row["contender"]["name"] == "gguf-q4":
            assert (row["failure"], row["turns"]) == ("RuntimeError: no node pack", [])
        else:
            assert len(row["turns"]) == 2
            assert row["ms"] > 0
