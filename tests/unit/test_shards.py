"""Checkpoints of several files: found by any of their names, and refused when they do not belong together."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from flux_nf4.nf4_loader.checkpoint.errors import CheckpointError
from flux_nf4.nf4_loader.checkpoint.shards import read_checkpoint_header

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """Two shards with the tensors a and b, and their index."""
    for shard, name in zip(SHARDS, "ab", strict=True):
        save_file({name: torch.ones(3)}, tmp_path / shard)
    write_index(tmp_path, {"a": SHARDS[0], "b": SHARDS[1]})
    return tmp_path


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 24}, "weight_map": weight_map}))


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint_header(path)
    return str(caught.value)


@pytest.mark.parametrize("name", [*SHARDS, INDEX, ""])
def test_any_name_finds_every_shard(folder, name):
    header = read_checkpoint_header(folder / name)
    assert header.path == folder / name
    assert {name: entry.path.name for name, entry in header.tensors.items()} == dict(zip("ab", SHARDS, strict=True))
    for entry in header.tensors.values():
        with entry.path.open("rb") as file:
            file.seek(entry.offset)
            assert file.read(entry.nbytes) == torch.ones(3).numpy().tobytes()


@pytest.mark.parametrize("name", SHARDS)
def test_the_names_of_shards_do_where_the_index_is_gone(folder, name):
    (folder / INDEX).unlink()
    assert read_checkpoint_header(folder / name).tensors.keys() == {"a", "b"}


def save_another_model(folder):
    """Three shards that have the names of the first model's, but for their number."""
    for number in (1, 2, 3):
        save_file({f"c{number}": torch.ones(3)}, folder / f"model-0000{number}-of-00003.safetensors")


@pytest.mark.parametrize("name", SHARDS)
def test_a_shard_is_of_its_own_model_where_the_index_is_of_another(folder, name):
    save_another_model(folder)
    write_index(folder, {f"c{number}": f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)})
    assert read_checkpoint_header(folder / name).tensors.keys() == {"a", "b"}
    for other in ("model-00002-of-00003.safetensors", INDEX):
        assert read_checkpoint_header(folder / other).tensors.keys() == {"c1", "c2", "c3"}


def test_a_folder_with_shards_of_two_models_is_refused(folder):
    (folder / INDEX).unlink()
    save_another_model(folder)
    assert "the folder should hold one model" in refusal(folder)


def test_one_file_is_itself(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "flux.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "other.safetensors")
    assert read_checkpoint_header(tmp_path / "flux.safetensors").tensors.keys() == {"a"}


def test_a_folder_with_one_file_is_that_file(tmp_path):
    (tmp_path / "transformer").mkdir()
    save_file({"a": torch.ones(3)}, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "transformer" / "config.json").write_text("{}")
    for path in (tmp_path, tmp_path / "transformer"):
        assert read_checkpoint_header(path).tensors.keys() == {"a"}


def test_files_may_be_links_as_in_a_hub_cache(folder, tmp_path):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for name in (*SHARDS, INDEX):
        (snapshot / name).symlink_to(folder / name)
    assert read_checkpoint_header(snapshot).tensors.keys() == {"a", "b"}


@pytest.mark.parametrize("with_index", [True, False])
def test_a_missing_shard_is_named(folder, with_index):
    (folder / SHARDS[1]).unlink()
    if not with_index:
        (folder / INDEX).unlink()
    message = refusal(folder / SHARDS[0])
    assert f"1 of the model's 2 files are missing: {SHARDS[1]}" in message
    assert str(folder) not in message, "the page gets to see it"


def test_a_tensor_in_two_shards_is_refused(folder):
    save_file({"a": torch.ones(3), "b": torch.ones(3)}, folder / SHARDS[1])
    message = refusal(folder)
    assert message.startswith(f"{SHARDS[1]}: a: it is in this shard and in {SHARDS[0]}. Download all files")


@pytest.mark.parametrize(
    ("weight_map", "found"),
    [
        ({"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[1]}, f"c: the index says it is in {SHARDS[1]}; no shard has it"),
        ({"a": SHARDS[1], "b": SHARDS[0]}, f"a: the index says it is in {SHARDS[1]}; it is in {SHARDS[0]}"),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(folder, weight_map, found):
    write_index(folder, weight_map)
    assert found in refusal(folder / SHARDS[0])


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "/outside.safetensors",
        "..\\outside.safetensors",
        "C:outside.safetensors",
        "inner/outside.safetensors",
        "..",
        "",
        "model.ckpt",
        "a\0.safetensors",
    ],
)
def test_an_index_that_names_a_file_elsewhere_is_refused(folder, name):
    write_index(folder, {"a": SHARDS[0], "b": name})
    message = refusal(folder)
    assert message.startswith(f"{INDEX}: the index names {name!r}, which is no .safetensors file of its own folder")


def test_an_index_that_names_one_file_twice_is_refused(folder):
    (folder / SHARDS[1]).unlink()
    (folder / SHARDS[1]).symlink_to(folder / SHARDS[0])
    assert f"{SHARDS[0]} and {SHARDS[1]} are one and the same file" in refusal(folder)


def test_an_index_that_names_a_tensor_twice_is_refused(folder):
    (folder / INDEX).write_text(f'{{"weight_map": {{"a": "{SHARDS[0]}", "a": "{SHARDS[1]}"}}}}')
    assert "'a' is there twice" in refusal(folder)


@pytest.mark.parametrize(
    "text",
    ["", "[", "[]", "null", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 9999],
)
def test_an_index_that_is_none_is_refused(folder, text):
    (folder / INDEX).write_text(text)
    message = refusal(folder)
    assert message.startswith(f"{INDEX}: the index ")
    assert message.endswith("Download all files of this folder again, from one source.")


def test_an_index_in_another_encoding_is_refused(folder):
    (folder / INDEX).write_bytes(b"\xff\xfe{\0}\0")
    assert "not readable as JSON" in refusal(folder)


def test_links_in_a_circle_are_refused(tmp_path):
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    one.symlink_to(other)
    other.symlink_to(one)
    assert "cannot be read" in refusal(one)
    write_index(tmp_path, {"a": one.name, "b": other.name})
    assert "2 of the model's 2 files are missing" in refusal(tmp_path / INDEX)


@pytest.mark.parametrize("names", [(), ("a.safetensors", "b.safetensors"), ("config.json", "model.bin")])
def test_a_folder_that_holds_no_one_model_is_refused(tmp_path, names):
    for name in names:
        save_file({"a": torch.ones(3)}, tmp_path / name)
    assert "the folder should hold one model, as diffusers saves it" in refusal(tmp_path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "flux.safetensors")
    assert "no ordinary file" in refusal(tmp_path / "flux.safetensors")
