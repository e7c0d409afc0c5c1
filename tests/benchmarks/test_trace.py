"""A trace is read as what it says."""

import pytest
from trace_of_calls import Gap, timeline


def kernel(name, ts, dur, stream=7):
    return {"cat": "kernel", "name": name, "ts": ts, "dur": dur, "args": {"stream": stream}}


def copy(name, ts, dur, nbytes):
    return {"cat": "gpu_memcpy", "name": name, "ts": ts, "dur": dur, "args": {"stream": 20, "bytes": nbytes}}


def test_compute_copies_and_gaps_are_told_apart():
    found = timeline(
        [
            kernel("late", 150.0, 50.0),
            kernel("early", 100.0, 20.0),
            kernel("late", 210.0, 40.0),
            kernel("on another stream", 100.0, 30.0, stream=8),
            copy("Memcpy HtoD (Pinned -> Device)", 90.0, 100.0, 5_000_000),
            copy("Memcpy DtoH (Device -> Pageable)", 90.0, 100.0, 1),
            {"cat": "cpu_op", "name": "aten::linear", "ts": 0.0, "dur": 900.0, "args": {}},
            {"ph": "M", "name": "process_name"},
        ]
    )
    assert found.span_us == 150.0
    assert found.compute_us == 110.0
    assert found.gaps == [Gap(30.0, "late"), Gap(10.0, "late")]
    assert (found.copies_us, found.copied_bytes) == (100.0, 5_000_000)
    assert found.kernels == [("late", 90.0, 2), ("on another stream", 30.0, 1), ("early", 20.0, 1)]
    text = found.markdown(calls=2)
    assert "0.07 ms a call: compute 0.06 ms, standing still 0.02 ms" in text
    assert "50.0 GB/s" in text


def test_a_trace_without_a_kernel_is_refused():
    with pytest.raises(ValueError, match="nothing ran on a GPU"):
        timeline([])
