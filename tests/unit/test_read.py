"""Reading slices: every byte lands where it should, or the reading ends with a reason."""

import itertools
import random
import threading
from pathlib import Path

import pytest
import torch

from flux_nf4.nf4_loader.checkpoint import read
from flux_nf4.nf4_loader.checkpoint.errors import CheckpointError
from flux_nf4.nf4_loader.checkpoint.read import FileSlice, read_slices, read_small

CHUNK = 64


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(read, "CHUNK_BYTES", CHUNK)


@pytest.fixture
def content():
    return random.Random(0).randbytes(20_000)


@pytest.fixture
def path(tmp_path, content):
    path = tmp_path / "flux.safetensors"
    path.write_bytes(content)
    return path


def bytes_of(tensor):
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def ignore(count):
    pass


def no_reader_runs():
    return not any(thread.name.startswith("nf4-read") for thread in threading.enumerate())


@pytest.mark.parametrize(
    "nbytes", [0, 1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK - 1, 3 * CHUNK + 5, 9999]
)
@pytest.mark.parametrize("offset", [0, 1, 63, 64, 1000])
def test_bytes_land_exactly(path, content, offset, nbytes):
    memory = torch.full((nbytes + 2,), 0xAA, dtype=torch.uint8)
    read_slices([FileSlice(path, offset, memory[1:-1])], ignore)
    assert bytes_of(memory) == b"\xaa" + content[offset : offset + nbytes] + b"\xaa"


DTYPES = (
    torch.uint8,
    torch.int8,
    torch.bool,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (17, 5), (2, 3, 4), (0,), (0, 8)], ids=str)
def test_a_destination_may_be_of_any_dtype_and_shape(path, content, dtype, shape):
    destination = torch.zeros(shape, dtype=dtype)
    read_slices([FileSlice(path, 7, destination)], ignore)
    assert bytes_of(destination) == content[7 : 7 + destination.nbytes]


def test_a_destination_may_be_a_parameter(path, content):
    parameter = torch.nn.Parameter(torch.zeros(10))
    read_slices([FileSlice(path, 0, parameter)], ignore)
    assert bytes_of(parameter.detach()) == content[:40]


def test_many_slices_in_any_order_fill_many_destinations(path, content):
    sizes = [random.Random(1).randrange(300) for _ in range(60)]
    ends = list(itertools.accumulate(sizes))
    slices = [
        FileSlice(path, end - size, torch.zeros(size, dtype=torch.uint8)) for end, size in zip(ends, sizes, strict=True)
    ]
    random.Random(2).shuffle(slices)
    read_slices(slices, ignore)
    for item in slices:
        assert bytes_of(item.destination) == content[item.offset : item.offset + item.destination.nbytes]


def test_the_last_byte_of_the_file_is_read(path, content):
    destination = torch.zeros(100, dtype=torch.uint8)
    read_slices([FileSlice(path, len(content) - 100, destination)], ignore)
    assert bytes_of(destination) == content[-100:]


def test_chunks_of_real_size_work_too(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "CHUNK_BYTES", 1 << 20)
    path = tmp_path / "flux.safetensors"
    content = random.Random(3).randbytes((2 << 20) + 12_345)
    path.write_bytes(content)
    destination = torch.zeros(len(content), dtype=torch.uint8)
    read_slices([FileSlice(path, 0, destination)], ignore)
    assert bytes_of(destination) == content


def test_nothing_to_read_is_read(path):
    read_slices([], ignore)


# Progress


def test_progress_adds_up_to_the_total(path):
    counts = []
    slices = [FileSlice(path, 0, torch.zeros(1000, dtype=torch.uint8)), FileSlice(path, 5000, torch.zeros(333))]
    read_slices(slices, counts.append)
    assert sum(counts) == 1000 + 4 * 333
    assert len(counts) == -(-1000 // CHUNK) + -(-4 * 333 // CHUNK)
    assert all(0 < count <= CHUNK for count in counts)


def test_progress_is_called_on_the_callers_thread(path):
    threads = set()
    read_slices([FileSlice(path, 0, torch.zeros(1000))], lambda count: threads.add(threading.current_thread()))
    assert threads == {threading.current_thread()}


class Interrupt(BaseException):
    """As ComfyUI's is from 0.33 on."""


@pytest.mark.parametrize("error", [Interrupt(), RuntimeError("stop"), ConnectionError("the browser is gone")])
def test_what_progress_raises_ends_the_reading_and_is_raised(path, monkeypatch, error):
    monkeypatch.setattr(read, "THREADS", 1)
    chunks_read = []

    def counted(batch, read_batch=read._read_batch):
        chunks_read.extend(batch)
        interrupted.wait(0.01)  # the rest is still to come when the first is reported
        return read_batch(batch)

    interrupted = threading.Event()

    def interrupt(count):
        interrupted.set()
        raise error

    monkeypatch.setattr(read, "_read_batch", counted)
    with pytest.raises(type(error)) as caught:
        read_slices([FileSlice(path, 0, torch.zeros(250 * CHUNK, dtype=torch.uint8))], interrupt)
    assert caught.value is error
    assert len(chunks_read) < 250
    assert no_reader_runs()


def test_no_thread_stays_behind(path):
    read_slices([FileSlice(path, 0, torch.zeros(1000))], ignore)
    assert no_reader_runs()


# Files that fail


@pytest.mark.parametrize("kept", [0, 1, CHUNK, 5 * CHUNK + 3, 1999])
def test_a_file_that_has_shrunk_is_refused(path, content, kept):
    path.write_bytes(content[:kept])
    with pytest.raises(CheckpointError) as caught:
        read_slices([FileSlice(path, 0, torch.zeros(2000, dtype=torch.uint8))], ignore)
    message = str(caught.value)
    assert message.startswith("flux.safetensors: it ended at byte ")
    assert f"byte {kept:,} while" in message or kept < 2000 - CHUNK  # another chunk past the end may be the first
    assert no_reader_runs()


def test_a_file_that_is_gone_is_refused(path):
    path.unlink()
    with pytest.raises(CheckpointError, match=r"^flux.safetensors: reading it failed \(No such file[^/]*$"):
        read_slices([FileSlice(path, 0, torch.zeros(10))], ignore)


def test_a_disk_that_fails_is_reported(path, monkeypatch):
    opened = Path.open

    def failing(self, *args, **kwargs):
        file = opened(self, *args, **kwargs)
        file.close()
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(CheckpointError, match=r"reading it failed \(Input/output error\)\. Check the disk"):
        read_slices([FileSlice(path, 0, torch.zeros(1000))], ignore)
    assert no_reader_runs()


def test_short_reads_are_continued(path, content, monkeypatch):
    class Trickle:
        """A file that gives three bytes at a time, as a network disk may."""

        def __init__(self, file):
            self.file = file
            self.seek = file.seek

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.file.close()

        def readinto(self, view):
            return self.file.readinto(view[:3])

    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *args, **kwargs: Trickle(opened(self, *args, **kwargs)))
    destination = torch.zeros(500, dtype=torch.uint8)
    read_slices([FileSlice(path, 11, destination)], ignore)
    assert bytes_of(destination) == content[11:511]


def test_what_is_to_be_done_after_a_slice_finds_all_its_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "CHUNK_BYTES", 7)
    path = tmp_path / "file"
    path.write_bytes(bytes(range(200)))
    slices, found = [], {}
    for start in range(0, 200, 50):
        destination = torch.zeros(50, dtype=torch.uint8)
        slices.append(
            read.FileSlice(path, start, destination, lambda s=start, d=destination: found.update({s: d.tolist()}))
        )
    read.read_slices(slices, lambda _: None)
    assert found == {start: list(range(start, start + 50)) for start in range(0, 200, 50)}


def test_small_slices_are_read_from_each_of_their_files(path, content, tmp_path):
    (tmp_path / "other.safetensors").write_bytes(content[::-1])
    wanted = [(path, 3, 5), (path, 0, 1), (tmp_path / "other.safetensors", 19_990, 10), (path, 7, 0)]
    memory = [torch.zeros(nbytes, dtype=torch.uint8) for _, _, nbytes in wanted]
    read_small([FileSlice(file, offset, into) for (file, offset, _), into in zip(wanted, memory, strict=True)])
    for (file, offset, nbytes), into in zip(wanted, memory, strict=True):
        assert bytes_of(into) == file.read_bytes()[offset : offset + nbytes]


def test_a_small_slice_beyond_the_end_is_refused(path):
    with pytest.raises(CheckpointError, match=r"ended at byte 20,000"):
        read_small([FileSlice(path, 19_999, torch.zeros(2, dtype=torch.uint8))])
