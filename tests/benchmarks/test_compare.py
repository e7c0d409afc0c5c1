"""The comparison runs from end to end, small and on the CPU, and a contender that fails takes nothing with it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
CONTENDERS = ("bnb-nf4", "bnb-nf4-moved-7-7", "streamed-0-0", "comfy-bf16", "gguf-q4")


@pytest.fixture(scope="module")
def rows(comfyui, tmp_path_factory):
    """Rows of the JSON by case and contender; the copy of ComfyUI-GGUF that is given is no such thing."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "nodes.py").write_text("raise RuntimeError('no node pack')")
    command = [sys.executable, str(ROOT / "benchmarks" / "compare.py"), "--dry-run", "--rounds", "2", "--calls", "2"]
    command += ["--seconds", "0.1", "--folder", str(folder / "weights"), "--output", str(folder / "results")]
    command += ["--gguf-pack", str(folder), "--cases", "tiny", "tiny-steps-cfg", "--only", *CONTENDERS]
    subprocess.run(command, check=True, timeout=300, env=os.environ | {"COMFYUI_PATH": str(comfyui)})
    results = json.loads((folder / "results" / "compare.json").read_text())
    assert (folder / "results" / "compare.md").read_text().count("\n## ") == 3
    return {(row["case"]["name"], row["contender"]["name"]): row for row in results["rows"]}


@pytest.mark.parametrize("case", ["tiny", "tiny-steps-cfg"])
def test_contenders_with_the_same_weights_make_the_same_picture(case, rows):
    first, *others = (rows[case, name] for name in CONTENDERS[:3])
    assert all(turn["difference"] is None for turn in first["turns"])
    for row in others:
        for turn in row["turns"]:
            assert turn["difference"] == {"compared_with": "bnb-nf4", "is_equal": True, "relative_error": 0.0}
    for turn in rows[case, "comfy-bf16"]["turns"]:
        assert 0 < turn["difference"]["relative_error"] < 0.02


def test_every_turn_is_timed(rows):
    for (case, name), row in rows.items():
        if name != "gguf-q4":
            assert len(row["turns"]) == 2
            assert row["ms"] > 0
            assert all(len(turn["ms"]) == (2 if case == "tiny" else len(turn["sampling_s"])) for turn in row["turns"])
            assert row["loaded"]["resident"] > row["loaded"]["resident_before"] > 0


def test_a_contender_that_breaks_is_reported_in_every_case(rows):
    for case in ("tiny", "tiny-steps-cfg"):
        assert rows[case, "gguf-q4"]["failure"] == "RuntimeError: no node pack"
        assert rows[case, "gguf-q4"]["turns"] == []
