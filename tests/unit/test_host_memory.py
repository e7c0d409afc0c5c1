"""The device is "meta", which has no values to copy back."""

import gc
import weakref

import pytest
import torch
from there_and_back import Copied, move
from torch import nn

from flux_nf4.offload import host_memory
from flux_nf4.offload.host_memory import give_back_host_memory, keep_host_memory


class Part(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)
        self.register_buffer("scale", torch.tensor([2.0, 3.0]))


@pytest.fixture(autouse=True)
def _any_ram_will_do(monkeypatch):
    """Whatever this machine has free."""
    monkeypatch.setattr(host_memory, "SPARE_BYTES", 0)


@pytest.fixture
def model():
    model = nn.Sequential(Part(), nn.ReLU(), nn.Sequential(Part()))
    keep_host_memory(model)
    return model


def addresses(model):
    return {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}


def test_it_returns_to_the_memory_that_it_came_from(model):
    places, values = addresses(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):
        move(model, "meta")
        assert all(tensor.is_meta for tensor in model.state_dict().values())
        move(model, "meta")
        move(model, "cpu")
        assert addresses(model) == places
        assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())


def test_each_part_returns_on_its_own(model):
    places = addresses(model)
    move(model, "meta")
    move(model[0], "cpu")
    assert [tensor.is_meta for tensor in model.state_dict().values()] == [False] * 3 + [True] * 3
    move(model, "cpu")
    assert addresses(model) == places


def test_what_took_the_place_of_a_tensor_stays(model):
    move(model, "meta")
    other, scale = torch.ones(2, 3), torch.ones(2)
    model[0].weight = nn.Parameter(other)
    model[0].scale = scale
    move(model, "cpu")
    assert model[0].weight.data_ptr() == other.data_ptr()
    assert model[0].scale.data_ptr() == scale.data_ptr()


@pytest.mark.parametrize("other", [torch.empty(2, 3, device="meta"), torch.empty(3, 2, device="meta").T])
def test_so_does_another_on_the_device_or_the_same_in_another_order(other, model):
    move(model, "meta")
    model[0].weight = nn.Parameter(other)
    with pytest.raises(Copied):
        move(model, "cpu")


def test_the_same_memory_in_another_order_is_not_the_old_tensor(model):
    model.append(nn.Linear(3, 3))
    keep_host_memory(model)
    move(model, "meta")
    model[3].weight.data = model[3].weight.data.T
    with pytest.raises(Copied):
        move(model, "cpu")


def test_what_is_written_to_on_the_device_is_copied(model):
    written = {}
    keep_host_memory(model, written)
    move(model, "meta")
    written["weight"] = "its values before"
    with pytest.raises(Copied):
        move(model, "cpu")
    written.clear()
    move(model, "cpu")


def test_a_tensor_that_does_not_tell_its_memory_is_copied(model, monkeypatch):
    def refuse(_):
        raise RuntimeError("it has no storage")

    monkeypatch.setattr(torch.Tensor, "untyped_storage", refuse)
    move(model, "meta")
    monkeypatch.undo()
    with pytest.raises(Copied):
        move(model, "cpu")


def test_a_tensor_of_another_dtype_does_not_become_the_old_one(model):
    move(model, "meta").half()
    with pytest.raises(Copied):
        move(model, "cpu")


def test_host_memory_that_is_changed_in_between_is_seen(model):
    move(model, "meta")
    move(model, "cpu")
    model[0].weight = nn.Parameter(torch.ones(2, 3))
    move(model, "meta")
    move(model, "cpu")
    assert model[0].weight.equal(torch.ones(2, 3))


def test_it_is_kept_only_while_ram_is_free(model, monkeypatch):
    monkeypatch.setattr(host_memory, "SPARE_BYTES", 1 << 60)
    memory = weakref.ref(model[0].weight.untyped_storage())
    move(model, "meta")
    gc.collect()
    assert memory() is None
    with pytest.raises(Copied):
        move(model, "cpu")


def test_it_is_not_kept_for_a_tensor_that_changes_its_dtype_on_the_way(model):
    memory = weakref.ref(model[0].weight.untyped_storage())
    model._apply(lambda tensor: tensor.to("meta", torch.half))
    gc.collect()
    assert memory() is None


def test_it_can_be_given_back(model):
    move(model, "meta")
    give_back_host_memory()
    with pytest.raises(Copied):
        move(model, "cpu")


def test_tied_parameters_share_their_memory_again():
    model = nn.ModuleList([nn.Embedding(4, 3), nn.Linear(3, 4)])
    model[1].weight = model[0].weight
    keep_host_memory(model)
    address = model[0].weight.data_ptr()
    move(model, "meta")
    move(model, "cpu")
    assert model[0].weight.data_ptr() == model[1].weight.data_ptr() == address


def test_it_takes_effect_once_and_keeps_no_model_alive(model):
    kind = type(model[0])
    keep_host_memory(model)
    assert type(model[0]) is kind
    assert isinstance(model[0], Part)
    module = weakref.ref(model[0])
    move(model, "meta")
    model[0] = nn.Identity()
    assert module() is None, "the last reference must be enough, without a collection"
