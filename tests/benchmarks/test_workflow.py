"""The whole workflow on a small card: what is run, and what is said of it. The models are stand-ins."""

from contextlib import nullcontext

import comfy.model_management
import pytest
import torch
import workflow
from workflow import Parts, measure_size, table

TILED = 5.0
"""How far a picture of tiles is from the latent."""


class Stand:
    """CLIP and VAE in one."""

    def __init__(self, log, pictures):
        self.log, self.pictures = log, pictures

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, text):
        self.log.append(f"encode {text}")
        return "positive"

    def decode(self, latent):
        self.log.append("decode")
        return latent + self.pictures.pop(0)

    def decode_tiled(self, latent):
        self.log.append("decode in tiles")
        return latent + TILED


@pytest.fixture
def measured(monkeypatch):
    """A function: rows of two rounds, with pictures that are off by these numbers, and what was called."""

    def measure(*off, caps=(0.0,)):
        log: list[str] = []

        def sample(model, positive, pixels, steps, on_step):
            log.append(f"{model} {pixels} {steps}")
            for _ in range(steps):
                on_step()
            return torch.zeros(1)

        monkeypatch.setattr(workflow, "sample", sample)
        monkeypatch.setattr(workflow, "capped", lambda *_: nullcontext())
        both = Stand(log, list(off))
        parts = Parts("streamed", both, both, "other", torch.device("cpu"))
        return measure_size(parts, caps, 512, 4, rounds=2), log

    return measure


def test_a_new_prompt_comes_next_and_the_first_again_after_another_model(measured):
    rows, log = measured(*[0] * 9)
    first, new = ([f"encode {text}", "streamed 512 4", "decode"] for text in workflow.TEXTS)
    turn = [*first, *new, "decode in tiles", "decode in tiles", "other 512 2", *first]
    assert log[-len(turn) * 2 :] == turn * 2
    assert [row["after"] for row in rows] == ["nothing", "itself", "another model"] * 2


def test_a_small_card_decodes_in_tiles_only_where_it_has_to(measured):
    rows, log = measured(*[0] * 15, caps=(0.0, 4.0))
    assert [row["cap_gib"] for row in rows] == ([0.0] * 3 + [4.0] * 3) * 2
    assert log.count("decode in tiles") == 6  # for both prompts, each time the whole card was measured
    assert table(rows).splitlines()[5].startswith("| as small as 4 GiB | nothing |")


def test_how_far_a_picture_is_from_the_first_is_told(measured):
    rows, _ = measured(9, 9, 9, 1.0, 2.0, 1.0, 1.5, 2.0, 1.0)  # the first three are the warming up
    assert [row["picture"] for row in rows] == [0, 0, 0, 0.5, 0, 0]
    assert [row["latent"] for row in rows] == [0] * 6
    assert "| 0, 0.5 | 0 of 2 |" in table(rows).splitlines()[2]


def test_a_picture_of_tiles_is_compared_with_one_of_tiles(measured):
    rows, _ = measured(9, 9, 9, 1.0, 2.0, 1.0, 1.0, 2.0, TILED + 0.25)
    assert [row["picture"] for row in rows] == [0, 0, 0, 0, 0, 0.25]
    assert [row["is_tiled"] for row in rows] == [False] * 5 + [True]
    assert "| 0, 0.2 | 1 of 2 |" in table(rows).splitlines()[4]


def test_ratios_are_to_the_whole_card_at_the_same_place():
    def row(cap, after, sample, decode, *, is_tiled=False):
        figures = {"encode": 1.0, "sample": sample, "decode": decode, "start_s": 0.0, "step_ms": 100.0}
        return {
            "cap_gib": cap,
            "after": after,
            "peak_gib": dict.fromkeys(workflow.STAGES, 2.0),
            "latent": 0.0,
            "picture": 0.0,
            "is_tiled": is_tiled,
            **figures,
            **({} if cap else {"tiles": 7.0}),
        }

    rows = [row(0.0, "nothing", 3, 1), row(0.0, "other", 1, 1), row(4.0, "nothing", 4, 1), row(4.0, "other", 3, 1)]
    rows += [row(4.5, "nothing", 3, 12, is_tiled=True), row(4.5, "other", 1, 7, is_tiled=True)]
    ratios = [line.split(" | ")[7] for line in table(rows).splitlines()[2:]]
    assert ratios == ["1.00", "1.00", "1.25", "2.00", "1.50", "1.00"]


def test_the_card_is_emptied_before_each_first_prompt(measured, monkeypatch):
    calls: list[str] = []
    monkeypatch.setattr(comfy.model_management, "unload_all_models", lambda: calls.append("empty"))
    monkeypatch.setattr(Stand, "decode", lambda *_: calls.append("decode") or torch.zeros(1))
    measured()
    assert calls == ["empty", "decode", "decode", "decode", "empty"] * 3


def test_a_file_is_made_once_and_none_where_one_is_given(tmp_path, monkeypatch):
    made = []

    def make(path, *_):
        made.append(path.name)
        path.write_bytes(b"")

    monkeypatch.setattr("make_checkpoint.make_checkpoint", make)
    monkeypatch.setattr("make_checkpoint.make_twin", make)
    for _ in range(2):
        assert workflow.other_model(tmp_path, is_small=True).parent == tmp_path
    assert made == ["flux-other-bf16.safetensors"]
    workflow.checkpoint(tmp_path, is_small=True)
    assert made[1:] == ["flux-nf4-all-in-one.safetensors"]
