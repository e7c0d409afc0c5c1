"""Tensors that layers get in addition to their own: an error on the way leaves none of them, anywhere."""

import itertools

import pytest
import torch
from simulated_device import SimulatedDevice
from streaming_model import StreamedModel

from flux_nf4.offload import extras as extras_module
from flux_nf4.offload import record as record_module
from flux_nf4.offload import streamer as streamer_module
from flux_nf4.offload.streamer import Streamer

LARGE, SMALL = 12, 2
"""Rows of extras that travel with their layer, and of those that stay on the device."""

PLACES = {
    "host memory of large ones": (extras_module, "HostArena", LARGE),
    "the third record of large ones": (extras_module, "HostRecord", LARGE),
    "the third record of small ones": (streamer_module, "HostRecord", SMALL),
    "the third copy of small ones to the device": (streamer_module, "put", SMALL),
}

CASES = [
    (place, had)
    for place, (_, name, _) in PLACES.items()
    for had in (0, SMALL, LARGE)
    if (name, had) != ("put", LARGE)  # as large ones go, all leaves the device, so nothing is copied there
]


@pytest.mark.parametrize(("place", "had"), CASES)
def test_an_error_leaves_none_and_nothing_on_the_device(place, had, monkeypatch):
    monkeypatch.setattr(record_module, "SMALL_BYTES", 128)
    model = StreamedModel(Streamer, SimulatedDevice(0))
    model.start()
    model.set_extras([had] * len(model.layers))
    model.forward()
    module, name, rows = PLACES[place]
    works, calls = getattr(module, name), itertools.count(1)

    def fail_later(*given, **named):
        if name == "HostArena" or next(calls) == 3:
            raise MemoryError
        return works(*given, **named)

    monkeypatch.setattr(module, name, fail_later)
    extras = {layer: {"extra": torch.ones(rows + 1, 4)} for layer in model.layers}
    with pytest.raises(MemoryError):
        model.streamer.set_extras(extras)
    monkeypatch.setattr(module, name, works)
    assert not any("extra" in layer._buffers for layer in model.layers)
    assert model.streamer.plan is None
    assert model.streamer.device_bytes == 0
    assert model.streamer.extras_arena is None
    for rows_of_all in (0, rows):
        model.set_extras([rows_of_all] * len(model.layers))
        model.forward()
        model.check()
