"""What the command says of a file is what loading it gives."""

import io
import os
import subprocess
import sys

import describe
import environment
import pytest
from make_checkpoint import Recipe, make_checkpoint
from packed_tensors import packed_tensors
from safetensors.torch import load_file, save_file
from sparse_checkpoint import make_sparse_checkpoint
from sparse_file import write_sparse
from torch import ones


def lines(path, monkeypatch, capsys, *options):
    monkeypatch.setattr(sys, "argv", ["describe.py", str(path), *options])
    describe.main()
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("recipe", "model", "weights"),
    [
        (Recipe(), "Flux.1 dev", "NF4, blocksize 64, absmax fp32"),
        (Recipe(variant="schnell", nested=True), "Flux.1 schnell", "NF4, blocksize 64, absmax nested"),
        (Recipe(in_channels=384, quant_type="fp4"), "Flux.1 dev (Fill)", "FP4, blocksize 64, absmax fp32"),
        (Recipe(in_channels=128), "Flux.1 dev (Canny or Depth)", "NF4, blocksize 64, absmax fp32"),
    ],
)
def test_the_facts_are_printed(recipe, model, weights, tmp_path, monkeypatch, capsys):
    path = tmp_path / "flux.safetensors"
    make_checkpoint(path, Recipe(**(vars(recipe) | {"hidden": 256, "unet_only": True})))
    printed = lines(path, monkeypatch, capsys, "--budget", "1")
    assert "layout        Black Forest Labs, 1 file" in printed
    assert f"model         {model}" in printed
    assert "blocks        1 double, 1 single" in printed
    assert any(line.endswith(f"weights in {weights}") for line in printed)
    assert "T5-XXL        not in the file" in printed
    assert "  double      █  1 of 1 stay" in printed
    assert "  single      █  1 of 1 stay" in printed
    assert printed[-1] == "  bus         0.00 GB a step, for 0 streamed blocks"


@pytest.mark.parametrize(
    ("mark", "model"),
    [("distilled_guidance_layer.norms.0.scale", "Chroma"), ("double_stream_modulation_img.lin.weight", "Flux 2")],
)
def test_relatives_are_named(mark, model, tmp_path, monkeypatch, capsys):
    tensors = packed_tensors("double_blocks.0.img_attn.qkv.weight", (96, 64), "nf4", 64)
    tensors |= packed_tensors("single_blocks.0.linear1.weight", (96, 64), "nf4", 64)
    tensors["guidance_in.in_layer.weight"] = tensors[mark] = ("BF16", (64, 64), None)
    write_sparse(tmp_path / "relative.safetensors", tensors)
    assert f"model         {model}" in lines(tmp_path / "relative.safetensors", monkeypatch, capsys)


def test_the_bar_shows_what_a_budget_keeps(tmp_path, monkeypatch, capsys):
    path = tmp_path / "flux.safetensors"
    make_sparse_checkpoint(path)
    printed = lines(path, monkeypatch, capsys, "--budget", "3")
    assert "RAM in total  11.06 GiB" in printed
    assert "  modulation  1.69 GiB beside the blocks: in VRAM with all of them, or computed ahead" in printed
    assert "  modulation  computed ahead of the steps" in printed
    bars = [line.split()[1] for line in printed if line.endswith(" stay")]
    assert [len(bar) for bar in bars] == [19, 38]
    assert all(set(bar) == set("█▄") for bar in bars)
    stay = [line.split()[2] for line in printed if line.endswith(" stay")]
    assert [str(bar.count("█")) for bar in bars] == stay
    printed = lines(path, monkeypatch, capsys, "--budget", "8")
    assert "  modulation  stays" in printed
    assert "  VRAM        6.24 GiB, of 6.24 for all" in printed


def test_a_budget_that_is_too_small_says_what_is_needed(tiny_file, monkeypatch, capsys):
    with pytest.raises(
        SystemExit,
        match=r"^a VRAM budget of 0\.00 GiB is too small: with every block streamed this model takes 0\.\d\d",
    ):
        lines(tiny_file, monkeypatch, capsys, "--budget", "0.0001")
    for budget in ("0", "-1", "inf", "nan", "1e400"):
        with pytest.raises(SystemExit):
            lines(tiny_file, monkeypatch, capsys, "--budget", budget)
        assert "a number of GiB above 0" in capsys.readouterr().err


@pytest.fixture
def lighthouse(tmp_path):
    """A file of which the name and the title are in Chinese."""
    path = tmp_path / "灯塔.safetensors"
    make_checkpoint(path, Recipe(hidden=256, unet_only=True))
    save_file(load_file(path), path, metadata={"modelspec.title": "灯塔"})
    return path


def check_lines(printed):
    assert len(printed.splitlines()) > 12
    assert "1 of 1 stay" in printed
    assert "a step, for 0 streamed blocks" in printed


@pytest.mark.parametrize("encoding", ["cp1252", "cp850", "utf-8"])
def test_a_terminal_that_lacks_characters_gets_all_lines(encoding, lighthouse, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["describe.py", str(lighthouse), "--budget", "1"])
    with io.TextIOWrapper(io.BytesIO(), encoding) as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        describe.main()
        terminal.flush()
        check_lines(terminal.buffer.getvalue().decode(encoding))


def test_so_does_a_system_without_a_language(lighthouse):
    command = [sys.executable, environment.ROOT / "commands/describe.py", lighthouse, "--budget", "1"]
    variables = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ran = subprocess.run(command, capture_output=True, env=variables, check=True, timeout=100)
    check_lines(ran.stdout.decode("ascii"))


def test_metadata_is_cut_and_escaped(tmp_path, monkeypatch, capsys):
    path = tmp_path / "flux.safetensors"
    make_checkpoint(path, Recipe(hidden=256, unet_only=True))
    title = "\x1b[2Jred\nvision: all fine"
    save_file(load_file(path), path, metadata={"title": title, "workflow": "a" * 160_000, "k" * 99: "v"})
    printed = lines(path, monkeypatch, capsys)
    assert all(line.isprintable() and len(line) < 200 for line in printed)
    assert r"title         \x1b[2Jred\nvision: all fine" in printed
    assert f"workflow      {'a' * 120}... (160,000 characters)" in printed
    assert f"{'k' * 60}... (99 characters) v" in printed


def test_another_file_is_named(tmp_path, monkeypatch, capsys):
    save_file({"decoder.conv_in.weight": ones(1)}, tmp_path / "ae.safetensors")
    with pytest.raises(SystemExit, match=r"ae\.safetensors: it is a VAE"):
        lines(tmp_path / "ae.safetensors", monkeypatch, capsys)


def test_a_text_encoder_is_described_and_planned(tmp_path, monkeypatch, capsys):
    path, tensors = tmp_path / "qwen3.safetensors", {}
    for index in range(2):
        layer = f"model.layers.{index}."
        tensors |= packed_tensors(f"{layer}mlp.up_proj.weight", (4096, 2560), "nf4", 64)
        tensors[f"{layer}self_attn.q_norm.weight"] = ("BF16", (128,), None)
        tensors[f"{layer}post_attention_layernorm.weight"] = ("BF16", (2560,), None)
    write_sparse(path, tensors | {"vision_tower.a.weight": ("BF16", (2**29, 1), None)})
    printed = lines(path, monkeypatch, capsys, "--budget", "1")
    assert printed[:3] == [
        "layout        transformers, 1 file",
        "model         Qwen3 4B, a text encoder (type flux2 or lumina2)",
        "layers        2 text",
    ]
    assert "  text        5.6 MiB each" in printed
    assert "text encoder  0.01 GiB (1.00 more in the file that is not used)" in printed
    assert any(line.startswith("  text ") and line.endswith("2 of 2 stay") for line in printed)
    save_file({"model.layers.0.self_attn.q_norm.weight": ones(4), **NAMED}, path)
    with pytest.raises(SystemExit, match="Qwen3 4B with dense weights"):
        lines(path, monkeypatch, capsys)


NAMED = {"model.layers.0.post_attention_layernorm.weight": ones(2560)}
