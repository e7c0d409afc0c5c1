"""What copies on streams leave behind in the thread that asks for them. torch.accelerator is a stand-in."""

from types import SimpleNamespace

import pytest
import torch

from flux_nf4.offload.copies import StreamCopies


class Stream:
    def __init__(self, index, name):
        self.device, self.name = torch.device("cuda", index), name

    def wait_event(self, _):
        pass


class Accelerators:
    """Several devices, each with its current stream, as `torch.accelerator` has them."""

    def __init__(self, current):
        self.device = current
        self.streams = [Stream(0, "compute of 0"), Stream(1, "compute of 1")]

    def current_stream(self, index=None):
        return self.streams[self.device if index is None else index]

    def set_stream(self, stream):
        self.device = stream.device.index
        self.streams[self.device] = stream


@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("fails", [False, True])
def test_a_copy_leaves_the_current_device_and_its_stream_as_they_were(monkeypatch, current, fails):
    accelerators = Accelerators(current)
    for name in ("current_stream", "set_stream"):
        monkeypatch.setattr(torch.accelerator, name, getattr(accelerators, name))
    copies = StreamCopies.__new__(StreamCopies)
    copies._index, copies._copy_stream = 1, Stream(1, "copies of 1")
    seen = []

    def copy_(*_, **__):
        seen.append(accelerators.current_stream().name)
        if fails:
            raise RuntimeError("CUDA error")

    done = SimpleNamespace(record=lambda stream: seen.append(f"recorded on {stream.name}"))
    try:
        copies.copy([(SimpleNamespace(copy_=copy_), None)], after=None, done=done)
    except RuntimeError:
        assert fails
    assert seen == ["copies of 1"] + ["recorded on copies of 1"] * (not fails)
    assert accelerators.device == current
    assert [stream.name for stream in accelerators.streams] == ["compute of 0", "compute of 1"]
