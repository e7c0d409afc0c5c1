"""What an answer to the page costs, and what it costs no more."""

import asyncio
import dataclasses
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
import torch
from paces import slowness
from safetensors.torch import save_file
from sparse_checkpoint import make_sparse_checkpoint

from flux_nf4.offload.comfyui.streaming import StreamingReport
from flux_nf4.offload.plan import Residency
from flux_nf4.offload.telemetry import ForwardCost
from flux_nf4.page import answers as answers_module
from flux_nf4.page.answers import answer_for, version_of
from flux_nf4.page.file_plan import Measured
from flux_nf4.page.reports import Reports
from flux_nf4.page.routes import parse_question

MEASURED = Measured(link_gbps=12.0, compute_ms=3.0)


@pytest.fixture
def full_size(tmp_path):
    path = tmp_path / "flux1-dev-bnb-nf4-v2.safetensors"
    make_sparse_checkpoint(path)
    return path


def version_if_any(path):
    return version_of(path) if path.exists() else None


def answers(path, budgets):
    """To these budgets, one after the other, and the CPU seconds that they took."""

    async def ask():
        return [
            json.loads(await answer_for(path, "checkpoints", Residency((), budget), MEASURED, version_if_any(path)))
            for budget in budgets
        ]

    def timed():
        began = time.thread_time()
        return asyncio.run(ask()), time.thread_time() - began

    with ThreadPoolExecutor(1) as thread:  # Playwright, which other tests use, leaves a loop running in this one
        return thread.submit(timed).result()


def test_a_question_that_was_answered_is_not_worked_out_again(full_size, monkeypatch):
    first, _ = answers(full_size, [2 << 30])
    monkeypatch.setattr(answers_module, "make_plan", None)
    assert answers(full_size, [2 << 30])[0] == first
    with pytest.raises(TypeError):
        answers(full_size, [3 << 30])


@pytest.mark.parametrize(("folder", "gib"), [("checkpoints", 11.06), ("diffusion_models", None)])
def test_the_ram_in_total_is_that_of_all_that_the_node_loads(folder, gib, full_size):
    with ThreadPoolExecutor(1) as thread:
        question = answer_for(full_size, folder, Residency((), None), None)
        found = json.loads(thread.submit(asyncio.run, question).result())["all_host_bytes"]
    assert found == (gib and pytest.approx(gib * 2**30, rel=1e-3))


def test_a_shard_that_comes_later_is_noticed(full_size):
    one, other = (full_size.with_name(f"flux-0000{number}-of-00002.safetensors") for number in (1, 2))
    full_size.rename(one)
    (missing,), _ = answers(one, [2 << 30])
    assert "1 of the model's 2 files are missing" in missing["problem"]
    save_file({"another": torch.ones(1)}, other)
    (found,), _ = answers(one, [2 << 30])
    assert found["blocks"]


def test_another_budget_of_a_known_file_is_worked_out_while_it_is_dragged(full_size, monkeypatch):
    """Where the machine has been measured, which costs most. A frame of the page has 16 ms.

    An answer takes 0.8 ms, and would take 18 if the plans of a model were made anew for each.
    """
    answers(full_size, [None])
    monkeypatch.setattr(answers_module, "_read_file", None)
    budgets = [(1 << 30) + (step << 25) for step in range(100)]
    rounds = [answers(full_size, budgets[first : first + 20]) for first in range(0, 100, 20)]
    assert min(seconds for _, seconds in rounds) / 20 < 0.004 * slowness()
    assert len({answer["device_bytes"] for given, _ in rounds for answer in given}) > 20


def test_who_asks_while_a_file_is_read_waits_for_that(full_size, monkeypatch):
    reads = []
    read = answers_module._read_file
    monkeypatch.setattr(answers_module, "_read_file", lambda *given: reads.append(given) or read(*given))

    async def ask():
        return await asyncio.gather(
            *(answer_for(full_size, "checkpoints", Residency((), None), None) for _ in range(8))
        )

    with ThreadPoolExecutor(1) as thread:
        given = thread.submit(asyncio.run, ask()).result()
    assert len(set(given)) == 1
    assert len(reads) == 1


def test_a_problem_names_no_folder(tmp_path):
    (gone,), _ = answers(tmp_path / "gone.safetensors", [None])
    assert gone["problem"].startswith("gone.safetensors: it cannot be read (No such file or directory)")


def report(node, total_ms=64.0, stall_ms=10.0, gbps=50.0, picture=None):
    cost = ForwardCost(0, 0, total_ms=total_ms, stall_ms=stall_ms, picture=picture)
    return StreamingReport(node, ("double", "single"), (), (), (), 1, 2, 2, gbps, cost)


def test_what_was_measured_is_of_its_device_file_and_node():
    reports, file = Reports(), Path("flux.safetensors")
    reports.add(report("1", 64.0), "cuda:0", file, None)
    reports.add(report("2", 170.0), "cuda:0", file, None)
    reports.add(report("3", 900.0, gbps=6.0), "cuda:1", file, None)
    reports.add(report("4", 1.0), "cuda:0", None, None)
    assert reports.measured("cuda:0", file, "1").compute_ms == 27.0
    assert reports.measured("cuda:0", file, "2").compute_ms == 80.0
    assert reports.measured("cuda:0", file, "9").compute_ms == 80.0, "the last of that file"
    assert reports.measured("cuda:1", file, "1").link_gbps == 6.0
    assert reports.measured("cuda:0", Path("other.safetensors"), "1") is None


def test_what_was_measured_is_of_its_size_of_picture_first():
    reports, file = Reports(), Path("flux.safetensors")
    large, small, other = (1024, 1024), (512, 512), (768, 768)
    reports.add(report("1", 170.0, picture=large), "cuda:0", file, None)
    reports.add(report("2", 64.0, picture=small), "cuda:0", file, None)

    def compute_ms(node, picture=None):
        return reports.measured("cuda:0", file, node, picture).compute_ms

    assert (compute_ms("1", large), compute_ms("1"), compute_ms("1", other)) == (80.0, 80.0, 80.0)
    assert (compute_ms("1", small), compute_ms("2", large)) == (27.0, 80.0), "another node's, of that size"
    assert compute_ms("9") == 27.0, "the last of that file"
    assert reports.measured("cuda:0", file, "1", other).picture == large, "it says what it is of"
    reports.add(report("1", 70.0, picture=small), "cuda:0", file, None)
    assert (compute_ms("1"), compute_ms("1", large)) == (30.0, 80.0)


def test_an_answer_says_at_which_size_it_was_measured(full_size, monkeypatch):
    monkeypatch.setitem(globals(), "MEASURED", dataclasses.replace(MEASURED, picture=(1024, 768)))
    (answer,), _ = answers(full_size, [2 << 30])
    assert answer["picture"] == [1024, 768]
    assert answer["compute_ms"] == 3.0 * 57


@pytest.mark.parametrize(("asked", "picture"), [({"width": "64", "height": "32"}, (64, 32)), ({"width": "64"}, None)])
def test_a_question_may_name_the_size_of_the_picture(asked, picture):
    assert parse_question({"folder": "checkpoints", "file": "a.safetensors"} | asked).picture == picture


def test_reports_are_read_while_the_sampler_adds_to_them():
    reports, stop = Reports(), Event()

    def add():
        number = 0
        while not stop.is_set():
            reports.add(report(str(number)), "cpu", None, None)
            number += 1

    with ThreadPoolExecutor(1) as sampler:
        adding = sampler.submit(add)
        try:
            for _ in range(200):
                reports.as_json()
                if len(reports._by_node) > 3000:
                    reports._by_node.clear()
        finally:
            stop.set()
        adding.result()
