"""Two threads with a forward each, as ComfyUI's split of CFG has for two GPUs: they take turns block by block."""

import threading

import pytest
import torch
from cases import Case
from comfy_model import ComfyModel
from tiny_blocks import DOUBLES, SINGLES

from flux_nf4 import checkpoints
from flux_nf4.offload.turns import turns

CASE = Case("", 64, text_tokens=8)
LONG_S = 60.0


def at_work(load, counts):
    checkpoints._models.clear()
    model = ComfyModel(load(*counts), CASE)
    model.load()
    return model


def blocks_of(model):
    transformer = model.patcher.model.diffusion_model
    return [*transformer.double_blocks, *transformer.single_blocks]


@pytest.mark.parametrize("counts", [(0, 0), (DOUBLES, SINGLES)], ids=["streamed", "resident"])
def test_two_forwards_alternate_and_give_what_each_gives_alone(load, copies, counts, monkeypatch):
    monkeypatch.setattr(turns, "_patience_s", LONG_S)
    models = {name: at_work(load, counts) for name in "ab"}
    with torch.inference_mode():
        expected = {name: model.forward() for name, model in models.items()}
    called, found = [], {}

    def run(name):
        with torch.inference_mode():
            found[name] = models[name].forward()

    for name, model in models.items():
        for block in blocks_of(model):
            block.register_forward_hook(lambda *_, name=name: called.append(name))
    threads = [threading.Thread(target=run, args=(name,), daemon=True) for name in models]
    with turns.taken():
        for count, thread in enumerate(threads, 1):
            thread.start()
            for _ in range(int(LONG_S / 0.01)):
                if len(turns._waiting) == count:
                    break
                thread.join(0.01)
    for thread in threads:
        thread.join(LONG_S)
        assert not thread.is_alive()
    assert called == ["a", "b"] * (DOUBLES + SINGLES)
    assert all(torch.equal(found[name], expected[name]) for name in models)


def test_compiled_blocks_take_no_turns(load, copies, monkeypatch):
    """They would keep it for the whole forward."""
    model = at_work(load, (1, 1))
    has_turn = []
    blocks_of(model)[0].register_forward_hook(lambda *_: has_turn.append(turns._has_it))
    with torch.inference_mode():
        model.forward()
        monkeypatch.setattr(model.patcher.model.streaming.streamer, "whole_blocks", True)
        model.forward()
    assert has_turn == [True, False]
