"""What a run has measured becomes one piece of advice, which the page gets with the report."""

import pytest
import torch

from flux_nf4.offload.comfyui.streaming import StreamingReport
from flux_nf4.offload.telemetry import ForwardCost
from flux_nf4.page.reports import advise_next, report_as_json


def report(total_ms=300.0, stall_ms=90.0, link_gbps=12.0, **changes):
    cost = ForwardCost(10, 0, total_ms, stall_ms)
    given = {
        "wanted": (0,),
        "resident": (0,),
        "streamed": (1, 2),
        "device_bytes": 1,
        "host_bytes": 8,
        "pinned_bytes": 8,
    }
    return StreamingReport(
        node_id="1", kinds=("double", "double", "single"), link_gbps=link_gbps, cost=cost, **given | changes
    )


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"stall_ms": 90.0}, "more_vram"),
        ({"stall_ms": 9.0}, "keeps_up"),
        ({"pinned_bytes": 4}, "not_pinned"),
        ({"link_gbps": 6.0}, "slow_link"),
        ({"streamed": (), "resident": (0, 1, 2)}, "all_resident"),
    ],
)
def test_a_run_says_what_to_do_next(changes, code):
    advice = advise_next(report(**changes))
    assert advice.code == code
    if code == "more_vram":
        assert advice.figures == {"gbps": 12.0, "percent": pytest.approx(30.0)}


@pytest.mark.parametrize("changes", [{"total_ms": None}, {"stall_ms": None}, {"link_gbps": None}])
def test_what_was_not_measured_is_not_guessed(changes):
    assert advise_next(report(**changes)) is None


def test_a_run_tells_the_size_of_its_picture(load, sample, copies):
    patcher = load(2, 2)
    for height, width, steps in ((8, 12, 2), (16, 8, 8)):  # each eighth forward is timed
        sample(patcher, steps=steps, latent=torch.zeros(1, 16, height, width))
        assert patcher.report().cost.picture == (8 * width, 8 * height)
        assert report_as_json(patcher.report(), None)["cost"]["picture"] == (8 * width, 8 * height)


def test_the_page_gets_it_with_the_report():
    assert report_as_json(report(), None)["advice"]["code"] == "more_vram"
    assert report_as_json(report(total_ms=None), None)["advice"] is None
