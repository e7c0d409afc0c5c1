"""Records: a block's tensors as views of flat bytes."""

import pytest
import torch
from torch import nn

from flux_nf4.offload import record
from flux_nf4.offload.record import ALIGNMENT, BoundTile, extras_layouts, keep_in_place, layout_of, views_of


@pytest.fixture(autouse=True)
def _threshold(monkeypatch):
    monkeypatch.setattr(record, "SMALL_BYTES", 20)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 5, dtype=torch.bfloat16)
        self.norm = nn.LayerNorm(7)
        self.register_buffer("codes", torch.zeros(11, dtype=torch.uint8))
        self.register_buffer("scalar", torch.tensor(2.0))
        self.register_buffer("nothing", None)


def bind(block, layout, memory):
    for part in (*layout.tiles, layout.small):
        BoundTile(block, part, memory)


def test_every_tensor_has_an_aligned_place_of_its_own():
    layout = layout_of(Block())
    assert [tile.module for tile in layout.tiles] == ["linear", "norm"]
    names = [f"{field.module}.{field.name}" for tile in layout.tiles for field in tile.fields]
    assert names == ["linear.weight", "norm.weight", "norm.bias"]
    assert [f"{field.module}.{field.name}" for field in layout.small.fields] == [".codes", ".scalar", "linear.bias"]
    end = 0
    for part in (*layout.tiles, layout.small):
        assert part.offset == end
        inner = 0
        for field in part.fields:
            assert field.offset % ALIGNMENT == 0
            assert field.offset >= inner
            inner = field.offset + field.nbytes
        assert inner <= part.nbytes
        end += part.nbytes
    assert layout.nbytes == end


@pytest.mark.parametrize("small_bytes", [20, 21])
def test_what_is_added_travels_from_the_size_on_that_counts_as_large(small_bytes, monkeypatch):
    monkeypatch.setattr(record, "SMALL_BYTES", small_bytes)
    added = {"linear": {"factor": torch.zeros(20, dtype=torch.uint8)}, "norm": {"scale": torch.zeros(4)}}
    travelling, staying = extras_layouts(layout_of(Block()), added)
    assert [[field.name for field in tile.fields] for tile in travelling.tiles] == [
        ["factor"] * (small_bytes == 20),
        [],
    ]
    assert [field.name for field in staying.small.fields] == ["factor"] * (small_bytes > 20) + ["scale"]


class Scaled(torch.Tensor):
    """A weight made of two tensors, as ComfyUI's are that it keeps in 8 or 4 bits."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, device=codes.device)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def values(self):
        return self.codes * self.scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], "context"

    @staticmethod
    def __tensor_unflatten__(inner, context, outer_size, outer_stride):
        assert context == "context"
        return Scaled(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function}: only what it is made of is to be touched")


def block_of_scaled():
    block = nn.Linear(1, 1, bias=False)
    weight = Scaled(torch.arange(24, dtype=torch.int8).view(4, 6), torch.tensor(0.5))
    weight._is_param = True
    block._parameters["weight"] = weight
    return block


def test_a_tensor_made_of_tensors_is_bound_to_any_copy_of_their_bytes():
    block = block_of_scaled()
    layout = layout_of(block)
    assert layout == layout_of(block_of_scaled())
    assert layout.tiles[0].nbytes == 2 * ALIGNMENT  # and not that of its dtype and shape
    expected = block.weight.values()
    host = torch.zeros(layout.nbytes, dtype=torch.uint8)
    tile = BoundTile(block, layout.tiles[0], host)
    for home in (True, False):
        memory = host if home else host.clone()
        tile.bind(tile.home if home else views_of(layout.tiles[0], memory))
        assert isinstance(block.weight, Scaled)
        assert isinstance(block.weight, nn.Parameter)
        assert torch.equal(block.weight.values(), expected)
        assert block.weight.codes.data_ptr() == memory.data_ptr()
        assert block.weight.scale.data_ptr() == memory.data_ptr() + ALIGNMENT


def test_equal_blocks_have_equal_layouts():
    assert layout_of(Block()) == layout_of(Block())
    assert hash(layout_of(Block())) == hash(layout_of(Block()))


def test_a_whole_block_can_be_one_tile():
    block = Block()
    layout = layout_of(block)
    whole = layout.whole()
    assert [tile.module for tile in whole.tiles] == [""]
    assert whole.nbytes == layout.nbytes
    memory = torch.zeros(layout.nbytes, dtype=torch.uint8)
    bind(block, layout, memory)
    values = {name: value.clone() for name, value in block.state_dict().items()}
    pointers = {name: value.data_ptr() for name, value in block.state_dict().items()}
    bind(block, whole, memory)
    assert {name: value.data_ptr() for name, value in block.state_dict().items()} == pointers
    assert all(torch.equal(block.state_dict()[name], value) for name, value in values.items())


def test_a_block_that_owns_a_large_tensor_itself_is_one_tile():
    block = Block()
    block.table = nn.Parameter(torch.zeros(40))
    assert [tile.module for tile in layout_of(block).tiles] == [""]


def test_a_bound_block_keeps_its_values_and_reads_and_writes_the_record():
    block, reference = Block(), Block()
    reference.load_state_dict(block.state_dict())
    layout = layout_of(block)
    memory = torch.zeros(layout.nbytes, dtype=torch.uint8)
    bind(block, layout, memory)
    for name, value in reference.state_dict().items():
        assert torch.equal(block.state_dict()[name], value)
    assert isinstance(block.linear.weight, nn.Parameter)
    assert block.scalar.shape == ()
    with torch.no_grad():
        block.linear.weight.fill_(1)
    field = layout.tiles[0].fields[0]
    assert memory[field.offset : field.offset + field.nbytes].view(torch.bfloat16).eq(1).all()


def test_a_tile_swaps_between_copies_of_its_bytes():
    block = Block()
    layout = layout_of(block)
    tile = BoundTile(block, layout.tiles[0], torch.zeros(layout.nbytes, dtype=torch.uint8))
    other = views_of(tile.tile, torch.ones(tile.tile.nbytes, dtype=torch.uint8))
    tile.bind(other)
    assert block.linear.weight is other[0]
    tile.bind(tile.home)
    assert block.linear.weight is tile.home[0]
    for tensors, name, home, view in tile.swaps(other):
        assert tensors[name] is home
        assert any(view is one for one in other)


def test_moving_the_model_does_not_move_a_bound_block():
    block = Block()
    layout = layout_of(block)
    bind(block, layout, torch.zeros(layout.nbytes, dtype=torch.uint8))
    keep_in_place(block)
    pointer = block.linear.weight.data_ptr()
    model = nn.Sequential(block, nn.Linear(2, 2))
    model.to(torch.float64)
    assert model[1].weight.dtype == torch.float64
    assert block.linear.weight.dtype == torch.bfloat16
    assert block.to("meta").linear.weight.data_ptr() == pointer


def test_a_block_without_tensors_is_refused():
    with pytest.raises(ValueError, match="without parameters"):
        layout_of(nn.ReLU())


def test_tied_tensors_are_refused_by_name():
    block = Block()
    block.other = nn.Linear(3, 5)
    block.other.weight = block.linear.weight
    with pytest.raises(ValueError, match=r"linear.weight and other.weight of a Block share one tensor"):
        layout_of(block)
