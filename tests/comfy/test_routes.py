"""What an answer to the page costs, and what it costs no more."""

import json
import time

import pytest
from sparse_checkpoint import make_sparse_checkpoint

from flux_nf4 import routes
from flux_nf4.file_plan import Measured, Wanted

MEASURED = Measured(link_gbps=12.0, compute_ms=3.0)


@pytest.fixture
def full_size(tmp_path):
    path = tmp_path / "flux1-dev-bnb-nf4-v2.safetensors"
    make_sparse_checkpoint(path)
    return path


def test_a_question_that_was_answered_is_not_worked_out_again(full_size, monkeypatch):
    def ask(budget=2 << 30):
        return json.loads(routes.answer_for(full_size, True, Wanted((), budget), MEASURED))

    first = ask()
    monkeypatch.setattr(routes, "make_plan", None)
    assert ask() == first
    with pytest.raises(TypeError):
        ask(budget=3 << 30)


def test_another_budget_of_a_known_file_is_worked_out_while_it_is_dragged(full_size):
    """Where the machine has been measured, which costs most. A frame of the page has 16 ms."""
    budgets = [(1 << 30) + (step << 25) for step in range(100)]
    routes.answer_for(full_size, True, Wanted(()), MEASURED)  # reads the header
    began = time.thread_time()
    for budget in budgets:
        routes.answer_for(full_size, True, Wanted((), budget), MEASURED)
    assert (time.thread_time() - began) / len(budgets) < 0.004
