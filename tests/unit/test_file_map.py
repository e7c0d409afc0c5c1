"""Files as memory: the system's own copy, shared by all, there as long as somebody has a view of it."""

import errno
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from file_parts import Part, maps_of, open_files
from own_python import HEAD, run_script

from flux_nf4.offload import file_map
from flux_nf4.offload.arena import PAGE
from flux_nf4.offload.file_map import BringingIn, FileMapError, map_parts, range_of

MIB = 1 << 20
SIZE = 5 * MIB + 123


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "flux.safetensors"
    path.write_bytes(os.urandom(SIZE))
    return path


def bring_in(ranges, progress):
    with BringingIn(ranges) as brought_in:
        brought_in.wait(progress)


def bytes_of(tensor):
    return tensor.numpy().tobytes()


def test_parts_are_the_bytes_of_the_file_wherever_they_begin(file):
    content = file.read_bytes()
    places = [(0, 1), (PAGE - 1, 2), (12_345, 3 * PAGE), (SIZE - 1, 1), (7, SIZE - 7)]
    for (offset, nbytes), tensor in zip(places, map_parts([Part(file, *place) for place in places]), strict=True):
        assert tensor.dtype == torch.uint8
        assert bytes_of(tensor) == content[offset : offset + nbytes]


def test_what_is_close_together_is_one_range_and_what_is_far_apart_is_not(file):
    near, after, far = map_parts([Part(file, 100, 50), Part(file, 150 + PAGE, 50), Part(file, 4 * MIB, 50)])
    assert range_of(near) is range_of(after)
    assert range_of(near) is not range_of(far)
    assert range_of(far).nbytes <= PAGE


def test_neighbours_that_share_a_page_have_memory_of_their_own(file):
    first, second = (map_parts([Part(file, offset, 1000)])[0] for offset in (PAGE, PAGE + 1000))
    assert range_of(first).offset == range_of(second).offset == PAGE
    assert first.data_ptr() // PAGE != second.data_ptr() // PAGE


def test_all_who_use_a_part_have_the_same_memory(file, tmp_path):
    (tmp_path / "link.safetensors").symlink_to(file)
    part = Part(file, 100, 2 * PAGE)
    (first,), (second,) = map_parts([part]), map_parts([Part(tmp_path / "link.safetensors", 100, 2 * PAGE)])
    assert first.data_ptr() == second.data_ptr()
    assert range_of(first) is range_of(second)
    assert len(maps_of(file)) == len(open_files(file)) == 1


def test_it_may_only_be_read_and_is_shared(file):
    (tensor,) = map_parts([Part(file, 0, PAGE)])
    (line,) = maps_of(file)
    assert line.split()[1] == "r--s"
    assert not tensor.is_inference()


def test_it_goes_with_the_last_view_and_so_does_the_file(file):
    tensors = map_parts([Part(file, 100, PAGE), Part(file, 4 * MIB, PAGE)])
    view = tensors[0][5:10]
    del tensors
    assert len(maps_of(file)) == len(open_files(file)) == 1
    del view
    assert maps_of(file) == open_files(file) == []


def test_fifty_files_leave_nothing_behind(tmp_path):
    resident = Path("/proc/self/statm")
    before = int(resident.read_text().split()[1]) * PAGE
    for index in range(50):
        path = tmp_path / f"{index}.safetensors"
        path.write_bytes(bytes(4 * MIB))
        tensors = map_parts([Part(path, 0, MIB), Part(path, 3 * MIB, MIB)])
        bring_in(map(range_of, tensors), lambda _: None)
    del tensors
    gc.collect()
    assert maps_of(tmp_path / "0.safetensors") == open_files(path) == []
    assert file_map._ranges == {}
    assert int(resident.read_text().split()[1]) * PAGE < before + 20 * MIB


@pytest.mark.parametrize("knows_populate", [True, False])
def test_bringing_in_tells_of_every_byte_and_maps_all(file, knows_populate, monkeypatch):
    if not knows_populate:
        monkeypatch.setattr(file_map, "_POPULATE_READ", 12345)  # the system answers EINVAL
    monkeypatch.setattr(file_map, "_CHUNK_BYTES", MIB)
    tensors = map_parts([Part(file, 0, PAGE), Part(file, 2 * MIB, 3 * MIB)])
    ranges = [range_of(tensor) for tensor in tensors]
    told = []
    bring_in(ranges, told.append)
    assert len(told) == 4
    assert sum(told) == sum(item.nbytes for item in ranges) >= sum(tensor.nbytes for tensor in tensors)
    if knows_populate:
        assert resident_of(file) == 4 + 3 * MIB // 1024


def resident_of(path):
    """KiB of the file's maps that this process has mapped to pages."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    starts = [index for index, line in enumerate(lines) if line.endswith(str(path))]
    found = (next(line for line in lines[start:] if line.startswith("Rss:")) for start in starts)
    return sum(int(line.split()[1]) for line in found)


def test_what_progress_raises_ends_it(file, monkeypatch):
    monkeypatch.setattr(file_map, "_CHUNK_BYTES", PAGE)
    calls = []

    def interrupt(nbytes):
        calls.append(nbytes)
        raise InterruptedError

    (tensor,) = map_parts([Part(file, 0, SIZE)])
    with pytest.raises(InterruptedError):
        bring_in([range_of(tensor)], interrupt)
    assert len(calls) == 1


def test_what_ends_the_context_ends_the_reading(file, monkeypatch):
    monkeypatch.setattr(file_map, "_CHUNK_BYTES", PAGE)
    begun, done = [], []

    def bring_in(*_):
        begun.append(1)
        time.sleep(0.01)
        done.append(1)
        return PAGE

    monkeypatch.setattr(file_map, "_bring_in", bring_in)
    (tensor,) = map_parts([Part(file, 0, SIZE)])

    def interrupted():
        with BringingIn([range_of(tensor)]):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        interrupted()
    assert len(begun) == len(done) < SIZE // PAGE, "none is under way any more, and not all were begun"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("file-map")]


def test_a_system_without_threads_leaves_none_at_work(file, monkeypatch):
    def refuse(*_):
        raise RuntimeError("can't start new thread")

    (tensor,) = map_parts([Part(file, 0, SIZE)])
    brought_in = BringingIn([range_of(tensor)])
    monkeypatch.setattr(brought_in._pool, "submit", refuse)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        brought_in.__enter__()
    assert brought_in._pool._shutdown


def test_a_file_that_is_replaced_goes_on_with_its_old_contents(file, tmp_path):
    old = file.read_bytes()
    (tensor,) = map_parts([Part(file, 0, SIZE)])
    new = tmp_path / "new"
    new.write_bytes(bytes(SIZE))
    new.rename(file)
    range_of(tensor).file.require_unchanged()
    bring_in([range_of(tensor)], lambda _: None)
    assert bytes_of(tensor) == old
    (other,) = map_parts([Part(file, 0, SIZE)])
    assert bytes_of(other) == bytes(SIZE)


@pytest.mark.parametrize("how", ["cut short", "written to"])
def test_a_file_that_is_written_to_is_an_error_that_names_it(file, how):
    (tensor,) = map_parts([Part(file, 0, SIZE)])
    if how == "cut short":
        os.truncate(file, 10)
        with pytest.raises(FileMapError, match=r"^flux\.safetensors: it was written to while it was in use"):
            bring_in([range_of(tensor)], lambda _: None)
    else:
        with file.open("r+b") as target:
            target.write(b"other")
        os.utime(file, ns=(1, 1))
    with pytest.raises(FileMapError, match=r"^flux\.safetensors: it was written to while it was in use"):
        range_of(tensor).file.require_unchanged()


def test_a_file_that_ends_early_is_never_mapped(file):
    with pytest.raises(FileMapError, match=r"^flux\.safetensors: it ends at byte 5,243,003, before 5,243,004"):
        map_parts([Part(file, SIZE - 9, 10)])


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileMapError, match=r"^none\.safetensors: it cannot be opened \(No such file[^/]*$"):
        map_parts([Part(tmp_path / "none.safetensors", 0, 1)])


def test_a_system_that_refuses_the_map_is_told(file, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(file_map, "_map", refuse)
    with pytest.raises(FileMapError, match=r"it cannot be mapped into memory \(.*Cannot allocate memory\)"):
        map_parts([Part(file, 0, 1)])
    assert open_files(file) == []


def test_a_system_without_posix_maps_reads_the_same(file, monkeypatch):
    monkeypatch.setattr(file_map, "_libc", None)
    content = file.read_bytes()
    tensors = map_parts([Part(file, 12_345, PAGE), Part(file, SIZE - 10, 10)])
    bring_in(map(range_of, tensors), lambda _: None)
    assert [bytes_of(tensor) for tensor in tensors] == [content[12_345:][:PAGE], content[-10:]]
    del tensors
    assert maps_of(file) == open_files(file) == []


MAP_ALL = """
    from pathlib import Path
    from file_parts import Part
    from flux_nf4.offload.file_map import BringingIn, map_parts, range_of

    path = Path({path!r})
    tensors = map_parts([Part(path, 0, path.stat().st_size)])
    with BringingIn(map(range_of, tensors)) as brought_in:
        brought_in.wait(lambda _: None)
"""


def test_two_processes_have_it_in_ram_once(tmp_path):
    path = tmp_path / "shared.safetensors"
    path.write_bytes(os.urandom(16 * MIB))
    script = HEAD + textwrap.dedent(MAP_ALL.format(path=str(path))) + "print(flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        pss = run_script(
            MAP_ALL.format(path=str(path)),
            """
            lines = Path("/proc/self/smaps").read_text().splitlines()
            start = next(index for index, line in enumerate(lines) if line.endswith(str(path)))
            print(next(line for line in lines[start:] if line.startswith("Pss:")).split()[1])
            """,
        )
    finally:
        other.communicate()
    assert int(pss[0]) <= 1.05 * 16 * 1024 / 2


def test_a_process_that_is_killed_leaves_the_next_one_as_it_was(tmp_path):
    path = tmp_path / "killed.safetensors"
    path.write_bytes(os.urandom(16 * MIB))
    script = MAP_ALL.replace("lambda _: None", "lambda _: (print(flush=True), sys.stdin.read())")
    script = HEAD + textwrap.dedent(script.format(path=str(path)))
    killed = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    killed.stdout.readline()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    (tensor,) = map_parts([Part(path, 0, 16 * MIB)])
    bring_in([range_of(tensor)], lambda _: None)
    assert bytes_of(tensor) == path.read_bytes()
