"""Nodes that add each patch of a LoRA on its own (block weights): values and names as ever, one line in the log."""

import itertools

import comfy.lora
import loras
import pytest
import torch


@pytest.fixture
def patches(twin_model, shapes):
    """A LoRA of every layer of the blocks, as ComfyUI's reader gives it."""
    keys = comfy.lora.model_lora_keys_unet(twin_model, {})
    return comfy.lora.load_lora(loras.kohya(shapes), keys)


def one_by_one(patcher, patches, strengths=(0.5,)):
    patched = patcher.clone()
    for (name, value), strength in zip(patches.items(), itertools.cycle(strengths), strict=False):
        assert patched.add_patches({name: value}, strength) == [name]
    return patched


def lines(caplog):
    return [line for line in caplog.messages if line.startswith("LoRA:")]


def test_the_log_has_one_line_and_the_picture_is_the_same(load, patches, sample, caplog):
    caplog.set_level("INFO")
    at_once = load().clone()
    at_once.add_patches(patches, 0.5)
    (line,) = lines(caplog)
    caplog.clear()
    patched = one_by_one(load(), patches)
    assert not lines(caplog)
    assert torch.equal(sample(patched), sample(at_once))
    sample(patched.clone())
    assert lines(caplog) == [line]


def test_a_clone_ends_the_run(load, patches, caplog):
    caplog.set_level("INFO")
    first = one_by_one(load(), patches, (0.25, 1.0))
    second = one_by_one(first, dict(list(patches.items())[:3]))
    assert lines(caplog) == [
        f"LoRA: {len(patches)} patches applied at strengths 0.25 to 1, all that ComfyUI recognised for this model"
    ]
    second.add_patches(patches)
    assert [line.split(" patches")[0] for line in lines(caplog)[1:]] == ["LoRA: 3", f"LoRA: {len(patches)}"]


def test_what_does_not_fit_is_named_once_and_what_is_of_no_layer_is_not(load, patches, caplog):
    (name, adapter), *_ = patches.items()
    patched = load().clone()
    patched.add_patches({name: adapter})
    patched.add_patches({name: ("diff", (torch.full((2, 2), torch.nan),))})
    patched.add_patches({"clip_l.no.layer": adapter})
    assert not lines(caplog)
    patched.clone()
    (line,) = lines(caplog)
    assert line == f"LoRA: 1 patches applied at strength 1, 1 skipped: {name} (values that are not finite)"


def test_a_run_of_nothing_says_so(load, patches, caplog):
    patched = load().clone()
    for adapter in list(patches.values())[:5]:
        assert patched.add_patches({"clip_l.no.layer": adapter}) == []
    patched.clone()
    (line,) = lines(caplog)
    assert "none of its keys belongs to this model" in line


def test_no_state_dict_of_the_whole_model_is_made(load, patches, monkeypatch):
    patcher = load()
    monkeypatch.setattr(patcher.model, "state_dict", lambda *_, **__: pytest.fail("made for one patch"))
    one_by_one(patcher, patches)


@pytest.mark.parametrize("hook", [False, True])
def test_patches_are_kept_as_comfyui_keeps_them(load, twin, patches, hook):
    """It is not ComfyUI's own function that adds them: this tells when that changes."""
    (name, adapter), *others = patches.items()
    rows = (0, 0, adapter.weights[0].shape[0])
    given = dict(others) | {(name, rows): adapter, (name, rows, None): adapter, "of.no.layer": adapter}
    kept = []
    for patcher in (load().clone(), twin.clone()):
        before = patcher.patches_uuid
        for strengths in ((0.5, 1.0), (2.0, 0.25)):
            if hook:
                reference = type("Hook", (), {"hook_ref": "a hook"})()
                taken = patcher.add_hook_patches(reference, given, *strengths)
            else:
                taken = patcher.add_patches(given, *strengths)
        assert patcher.patches_uuid != before
        kept.append((set(taken), patcher.hook_patches["a hook"] if hook else patcher.patches))
    assert kept[0] == kept[1]
