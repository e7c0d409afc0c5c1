"""A download that went wrong is named, with what to do."""

import pytest
import torch
from packed_tensors import packed_tensors
from safetensors.torch import save_file
from sparse_file import write_sparse

from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue
from flux_nf4.nf4_loader.checkpoint.errors import CheckpointError
from flux_nf4.nf4_loader.checkpoint.header import read_header

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12044280207\n"
AGAIN = "damaged or cut short: download it again"
BROKEN = {
    "nothing yet": (b"", ["it has 0 bytes", "Let it finish"]),
    "holes": (bytes(1 << 20), ["its first bytes are zeros", "torrent"]),
    "page of a login": (
        b"\n<!doctype html>\n<html><head><title>\n Sign in - Hub </title>" + b" " * 5000,
        ["this is a web page ('Sign in - Hub'), not a model", "accept the licence"],
    ),
    "page with a mark": (b"\xef\xbb\xbf<html>\xe4\xb8\xad\xe6\x96\x87</html>", ["this is a web page, not a model"]),
    "page cut inside a letter": (b"<html>" + b"a" * 4089 + b"\xe4\xb8\xad" + b" " * 900, ["this is a web page"]),
    "error of a storage": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', ["this is a web page"]),
    "error as JSON": (b'{"error":"Access to model is restricted"}', ['a text (\'{"error":', "accept the licence"]),
    "short answer": (b"Entry not found", ["this is a text ('Entry not found'), not a model"]),
    "long answer": (b"Access denied. " * 1000, ["('Access denied. Access denied.", "...')"]),
    "Git LFS pointer": (LFS, ["this is a Git LFS pointer", "12,044,280,207 bytes", "git lfs pull"]),
    "pointer without a size": (LFS.split(b"size")[0], ["this is a Git LFS pointer", "a file, and not the file"]),
}


def refusal(path, read=read_header):
    with pytest.raises(CheckpointError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path.name}: ")
    assert len(message) < 500
    return message


@pytest.mark.parametrize(("content", "said"), BROKEN.values(), ids=BROKEN)
def test_it_is_said_what_came_in_place_of_the_model(content, said, tmp_path):
    path = tmp_path / "flux.safetensors"
    path.write_bytes(content)
    message = refusal(path)
    assert [words for words in said if words not in message] == []


@pytest.mark.parametrize("content", [b"\x1b[2J" * 20, b"<html>" + b"\x1b]0;title\x07" * 20, b"\xc2\x9b31m" * 20])
def test_nothing_of_a_file_reaches_a_terminal_that_would_obey_it(content, tmp_path):
    path = tmp_path / "flux.safetensors"
    path.write_bytes(content)
    message = refusal(path)
    assert "no safetensors file" in message
    assert message.isprintable()


@pytest.mark.parametrize("end", [".part", ".crdownload", ".aria2", ".!qB"])
def test_a_part_of_a_download_is_known_by_its_name(end, tmp_path):
    path = tmp_path / f"flux.safetensors{end}"
    save_file({"a": torch.zeros(4)}, path)
    assert f"its download has not finished: a file whose name ends in {end}" in refusal(path)


@pytest.mark.parametrize("kept", [0.05, 0.9])
def test_a_cut_file_is_to_wait_for_where_its_download_goes_on(kept, tmp_path):
    path = tmp_path / "flux.safetensors"
    save_file({"a": torch.zeros(400)}, path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    assert AGAIN in refusal(path)
    (tmp_path / "flux.safetensors.aria2").touch()
    message = refusal(path)
    assert "(flux.safetensors.aria2 is beside it): let it finish" in message
    assert AGAIN not in message


def test_it_is_said_how_much_of_a_file_is_there(tmp_path):
    path = tmp_path / "flux.safetensors"
    save_file({"a": torch.zeros(40_000)}, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 4])
    assert "(25 % of it)" in refusal(path)


def test_a_whole_file_is_read_whatever_an_old_download_left_beside_it(tmp_path):
    path = tmp_path / "flux.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    (tmp_path / "flux.safetensors.part").touch()
    assert list(read_header(path).tensors) == ["a"]


def test_a_hole_in_the_middle_is_noticed_by_its_quant_states(tmp_path):
    path = tmp_path / "flux.safetensors"
    name = "double_blocks.0.img_attn.qkv.weight"
    tensors = packed_tensors(name, (96, 64), "nf4", 64)
    write_sparse(path, tensors)
    assert read_catalogue(path).transformer
    write_sparse(path, {key: (dtype, shape, None) for key, (dtype, shape, _) in tensors.items()})
    assert f"{name}: its quant state is all zeros: a part of the file was never downloaded" in refusal(
        path, read_catalogue
    )
