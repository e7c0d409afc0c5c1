"""Files that appear whole or not at all, and what is left of those that never did."""

import errno
import logging
import multiprocessing
import os
import signal
import stat
from pathlib import Path

import pytest

from flux_nf4.nf4_loader.saving import atomic_file as module
from flux_nf4.nf4_loader.saving.atomic_file import PARTIAL_SUFFIX, remove_abandoned, whole_file


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_it_takes_the_place_of_the_old_one_when_it_is_done(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    with whole_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == [path.name]


def test_an_error_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        _write_and_stop(path)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == [path.name]


def _write_and_stop(path):
    with whole_file(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt


def test_its_bytes_are_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, seen = tmp_path / "model.safetensors", []
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append((os.fstat(descriptor).st_size, path.exists())))
    with whole_file(path) as file:
        file.write(b"new")
    assert seen[0] == (3, False)
    assert seen[1][1]  # then the folder's


@pytest.mark.parametrize("refused", ["open", "fsync"])
def test_a_file_system_that_syncs_no_folders_is_no_error(refused, tmp_path, monkeypatch):
    """The file has its name by then: an error would say that nothing was changed."""
    real, path = getattr(os, refused), tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    refusals = []

    def refuse_folders(file, *arguments):
        if file == tmp_path if refused == "open" else stat.S_ISDIR(os.fstat(file).st_mode):
            refusals.append(file)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(file, *arguments)

    monkeypatch.setattr(os, refused, refuse_folders)
    with whole_file(path) as file:
        file.write(b"new")
    assert len(refusals) == 1
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == [path.name]


@pytest.fixture
def writer(tmp_path):
    """A function: another process that is writing ``path``, to be killed."""
    started = []

    def start(path):
        ready, tell = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=_write_and_wait, args=(path, tell))
        process.start()
        started.append(process)
        assert ready.poll(60)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def _write_and_wait(path, tell):
    with whole_file(path) as file:
        file.write(b"half")
        file.flush()
        tell.send(None)
        signal.pause()


def test_what_a_killed_writer_left_is_removed_and_said(tmp_path, writer, caplog):
    process = writer(tmp_path / "model.safetensors")
    process.kill()
    process.join()
    (left,) = names(tmp_path)
    assert left.startswith("model.safetensors.")
    assert left.endswith(PARTIAL_SUFFIX)
    with caplog.at_level(logging.WARNING):
        remove_abandoned(tmp_path)
    assert names(tmp_path) == []
    assert f"removed {tmp_path / left} (0.00 GiB), which a saving that was broken off had left" in caplog.text


def test_what_another_process_is_writing_stays(tmp_path, writer, caplog):
    """And two that write the same file do not meet."""
    path = tmp_path / "model.safetensors"
    writer(path)
    before = names(tmp_path)
    remove_abandoned(tmp_path)
    assert names(tmp_path) == before
    assert not caplog.text
    with whole_file(path) as file:
        file.write(b"whole")
    assert path.read_bytes() == b"whole"
    assert names(tmp_path) == [path.name, *before]


def test_what_is_not_ours_stays(tmp_path):
    for name in ("model.safetensors", "model.safetensors.partial", "model.safetensors.part"):
        (tmp_path / name).write_bytes(b"theirs")
    before = names(tmp_path)
    remove_abandoned(tmp_path)
    assert names(tmp_path) == before


def test_a_writer_that_is_taken_for_abandoned_before_it_has_its_lock_begins_anew(tmp_path, monkeypatch):
    flock, removed = module.fcntl.flock, []

    def late(file, operation):
        if not removed:
            removed.extend(tmp_path.iterdir())
            removed[0].unlink()
        flock(file, operation)

    monkeypatch.setattr(module.fcntl, "flock", late)
    with whole_file(tmp_path / "model.safetensors") as file:
        file.write(b"whole")
    assert len(removed) == 1
    assert (tmp_path / "model.safetensors").read_bytes() == b"whole"


def test_ctrl_c_when_the_file_has_just_been_made_leaves_none(tmp_path, monkeypatch):
    def interrupted(self, mode):
        real_open(self, mode).close()
        raise KeyboardInterrupt

    real_open = Path.open
    monkeypatch.setattr(Path, "open", interrupted)
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "model.safetensors"):
        raise AssertionError("it was made")
    assert list(tmp_path.iterdir()) == []
