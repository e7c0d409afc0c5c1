"""ComfyUI's count of pinned memory and this package's share of it."""

import comfy.model_management
import pytest

from flux_nf4.offload.comfyui import pins

MIB = 2**20


@pytest.fixture
def management(monkeypatch):
    """ComfyUI's, with nothing pinned by anyone."""
    monkeypatch.setattr(comfy.model_management, "TOTAL_PINNED_MEMORY", 0, raising=False)
    monkeypatch.setattr(comfy.model_management, "MAX_PINNED_MEMORY", 100 * MIB, raising=False)
    monkeypatch.setattr(pins, "_counted_bytes", 0)
    return comfy.model_management


def pin(monkeypatch, nbytes):
    monkeypatch.setattr(pins, "pinned_by_all", lambda: nbytes)
    pins._count_pins()


def counted(management):
    return management.TOTAL_PINNED_MEMORY


def limit():
    return pins.pin_limit(0)[0]


def test_both_count_for_one_limit(management, monkeypatch):
    assert limit() == 100 * MIB
    pin(monkeypatch, 40 * MIB)
    assert counted(management) == 40 * MIB
    management.TOTAL_PINNED_MEMORY += 10 * MIB  # by ComfyUI
    assert limit() == 90 * MIB
    pin(monkeypatch, 30 * MIB)
    assert counted(management) == 40 * MIB


@pytest.mark.parametrize("pinned_since", [0, 10 * MIB])
def test_a_count_that_comfyui_has_set_to_zero_gets_this_packages_share_back(management, monkeypatch, pinned_since):
    pin(monkeypatch, 40 * MIB)
    management.TOTAL_PINNED_MEMORY = pinned_since  # set to 0 as the last of ComfyUI's pins went
    assert limit() == 100 * MIB - pinned_since
    assert counted(management) == 40 * MIB + pinned_since
    management.TOTAL_PINNED_MEMORY = pinned_since
    pin(monkeypatch, 0)
    assert counted(management) == pinned_since


def test_a_comfyui_that_pins_nothing_of_its_own_accord_forbids_nothing(management, monkeypatch):
    monkeypatch.setattr(management, "MAX_PINNED_MEMORY", -1)
    assert limit() > 100 * MIB
