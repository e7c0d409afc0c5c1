"""What an answer to the page costs, and what it costs no more."""

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from paces import slowness
from safetensors.torch import save_file
from sparse_checkpoint import make_sparse_checkpoint

from flux_nf4.offload.plan import Residency
from flux_nf4.page import routes
from flux_nf4.page.file_plan import Measured

MEASURED = Measured(link_gbps=12.0, compute_ms=3.0)


@pytest.fixture
def full_size(tmp_path):
    path = tmp_path / "flux1-dev-bnb-nf4-v2.safetensors"
    make_sparse_checkpoint(path)
    return path


def answers(path, budgets):
    """To these budgets, one after the other, and the CPU seconds that they took."""

    async def ask():
        return [json.loads(await routes.answer_for(path, True, Residency((), budget), MEASURED)) for budget in budgets]

    def timed():
        began = time.thread_time()
        return asyncio.run(ask()), time.thread_time() - began

    with ThreadPoolExecutor(1) as thread:  # Playwright, which other tests use, leaves a loop running in this one
        return thread.submit(timed).result()


def test_a_question_that_was_answered_is_not_worked_out_again(full_size, monkeypatch):
    first, _ = answers(full_size, [2 << 30])
    monkeypatch.setattr(routes, "make_plan", None)
    assert answers(full_size, [2 << 30])[0] == first
    with pytest.raises(TypeError):
        answers(full_size, [3 << 30])


def test_a_shard_that_comes_later_is_noticed(full_size):
    one, other = (full_size.with_name(f"flux-0000{number}-of-00002.safetensors") for number in (1, 2))
    full_size.rename(one)
    (missing,), _ = answers(one, [2 << 30])
    assert "1 of the model's 2 files are missing" in missing["problem"]
    save_file({"another": torch.ones(1)}, other)
    (found,), _ = answers(one, [2 << 30])
    assert found["blocks"]


def test_another_budget_of_a_known_file_is_worked_out_while_it_is_dragged(full_size):
    """Where the machine has been measured, which costs most. A frame of the page has 16 ms."""
    answers(full_size, [None])  # reads the header
    given, seconds = answers(full_size, [(1 << 30) + (step << 25) for step in range(100)])
    assert seconds / 100 < 0.004 * slowness()
    assert len({answer["device_bytes"] for answer in given}) > 20
