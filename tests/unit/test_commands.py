"""What users run from a shell: refusals at once and in a line, and an end in a line."""

import signal
import subprocess
import sys
from pathlib import Path

import describe
import pytest
import quantise
from make_checkpoint import Recipe, make_checkpoint

COMMANDS = Path(__file__).parents[2] / "commands"


def start(name, *arguments):
    command = [sys.executable, str(COMMANDS / f"{name}.py"), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("commands") / "flux.safetensors"
    make_checkpoint(path, Recipe(hidden=256, double_blocks=4, single_blocks=4, unet_only=True))
    return path


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        (describe, ["nowhere.safetensors"], "nowhere.safetensors: there is no such file or folder."),
        (quantise, ["nowhere.safetensors", "made.safetensors"], "there is no such file or folder."),
        (quantise, [__file__, "no/such/made.safetensors"], "no/such: there is no such folder. Make it first."),
        (quantise, [__file__, "made.safetensors", "--device", "foo"], "foo is no device of PyTorch, such as cpu"),
    ],
)
def test_what_cannot_be_is_refused_at_once(command, arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [command.__name__, *arguments])
    with pytest.raises(SystemExit) as refused:
        command.main()
    assert said in f"{refused.value}{capsys.readouterr().err}"


def test_a_reader_that_has_read_enough_is_no_error(model):
    process = start("describe", model)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 0


def test_quantising_that_is_interrupted_ends_in_a_line_and_leaves_no_file(model, tmp_path):
    process = start("quantise", model, tmp_path / "made.safetensors", "--type", "fp4")
    begun = process.stderr.read(3)  # of a per cent
    process.send_signal(signal.SIGINT)
    error = begun + process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert error.endswith("\ninterrupted\n")
    assert "Traceback" not in error
    assert "kernels" not in error
    assert list(tmp_path.iterdir()) == []
