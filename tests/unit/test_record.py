"""Records: a block's tensors as views of flat bytes."""

import pytest
import torch
from torch import nn

from flux_nf4.offload.record import ALIGNMENT, BoundBlock, layout_of, views_of


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 5, dtype=torch.bfloat16)
        self.norm = nn.LayerNorm(7)
        self.register_buffer("codes", torch.zeros(11, dtype=torch.uint8))
        self.register_buffer("scalar", torch.tensor(2.0))
        self.register_buffer("nothing", None)


def test_every_tensor_has_an_aligned_place_of_its_own():
    layout = layout_of(Block())
    names = {f"{field.module}.{field.name}" for field in layout.fields}
    assert names == {"linear.weight", "linear.bias", "norm.weight", "norm.bias", ".codes", ".scalar"}
    ends = [0]
    for field in layout.fields:
        assert field.offset % ALIGNMENT == 0
        assert field.offset >= ends[-1]
        ends.append(field.offset + field.nbytes)
    assert layout.nbytes >= ends[-1]


def test_equal_blocks_have_equal_layouts():
    assert layout_of(Block()) == layout_of(Block())
    assert hash(layout_of(Block())) == hash(layout_of(Block()))


def test_a_bound_block_reads_and_writes_the_record():
    block = Block()
    layout = layout_of(block)
    record = torch.zeros(layout.nbytes, dtype=torch.uint8)
    BoundBlock(block, layout).bind(views_of(layout, record))
    assert isinstance(block.linear.weight, nn.Parameter)
    assert block.scalar.shape == ()
    with torch.no_grad():
        block.linear.weight.fill_(1)
    field = next(field for field in layout.fields if field.name == "weight" and field.module == "linear")
    assert record[field.offset : field.offset + field.nbytes].view(torch.bfloat16).eq(1).all()


def test_moving_the_model_does_not_move_a_bound_block():
    block = Block()
    layout = layout_of(block)
    record = torch.zeros(layout.nbytes, dtype=torch.uint8)
    BoundBlock(block, layout).bind(views_of(layout, record))
    pointer = block.linear.weight.data_ptr()
    model = nn.Sequential(block, nn.Linear(2, 2))
    model.to(torch.float64)
    assert model[1].weight.dtype == torch.float64
    assert block.linear.weight.dtype == torch.bfloat16
    assert block.to("meta").linear.weight.data_ptr() == pointer


def test_a_block_without_tensors_is_refused():
    with pytest.raises(ValueError, match="without parameters"):
        layout_of(nn.ReLU())
