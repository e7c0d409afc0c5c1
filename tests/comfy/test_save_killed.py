"""What a saving that is killed leaves behind."""

import os
import signal
from pathlib import Path

import pytest
from safetensors.torch import save_file
from saved_files import values

from flux_nf4.nf4_loader.saving.quantise import QuantSettings
from flux_nf4.nf4_loader.saving.save import save_quantised
from flux_nf4.nf4_loader.saving.sources import sources_of_file


def in_child(action):
    """Run ``action`` in a fork; returns its process id."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    return child


def saved_until_killed(target, sources, after=None, *, waits=False):
    """Have a fork save, and kill it ``after`` so many tensors; None: let it end. Returns how many it has told.

    It ``waits`` to be killed, or goes on meanwhile.
    """
    reads, writes = os.pipe()
    left = after or 0

    def count(_):
        nonlocal left
        left -= 1
        os.write(writes, b".")
        if waits and not left:
            signal.pause()

    child = in_child(lambda: save_quantised(target, sources, QuantSettings(), progress=count))
    os.close(writes)
    with os.fdopen(reads, "rb", buffering=0) as saved:
        tensors = 0
        while tensors != after and saved.read(1):
            tensors += 1
        if after is not None:
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return tensors


@pytest.fixture
def sources(tmp_path_factory):
    dense = tmp_path_factory.mktemp("models") / "dense.safetensors"
    save_file(values(), dense)
    return sources_of_file(dense, all_in_one=False)


def test_whoever_is_killed_leaves_the_target_absent_or_whole(sources, tmp_path):
    target = tmp_path / "made.safetensors"
    every = saved_until_killed(target, sources)
    assert every == len(sources)
    whole = target.read_bytes()
    target.unlink()
    for after in (1, every // 2, every):
        saved_until_killed(target, sources, after, waits=True)
        assert not target.exists()
        assert len(list(tmp_path.iterdir())) == 1  # each removes what the one before it has left
    for after in (*range(1, every, every // 5), *[every] * 5):
        saved_until_killed(target, sources, after)
        assert len(list(tmp_path.iterdir())) <= 1
        if target.exists():
            assert target.read_bytes() == whole
            target.unlink()
    save_quantised(target, sources, QuantSettings())
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    assert target.read_bytes() == whole


@pytest.mark.parametrize("is_done", [False, True], ids=["before", "after"])
def test_the_target_has_its_name_when_all_is_in_it(is_done, sources, tmp_path):
    target = tmp_path / "made.safetensors"
    save_quantised(target, sources, QuantSettings())
    whole = target.read_bytes()
    target.write_bytes(b"precious")
    reads, writes = os.pipe()

    def save():
        rename = Path.replace

        def renamed_until_killed(partial, path):
            if is_done:
                rename(partial, path)
            os.write(writes, b".")
            signal.pause()

        Path.replace = renamed_until_killed
        save_quantised(target, sources, QuantSettings())

    child = in_child(save)
    assert os.read(reads, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert target.read_bytes() == (whole if is_done else b"precious")
