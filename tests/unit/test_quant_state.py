"""Quant states: exactly what bitsandbytes writes is read, and nothing that could not be used."""

import json
import re

import pytest
import torch
from bitsandbytes import functional as bnb

from flux_nf4.nf4_loader.checkpoint.quant_state import (
    BLOCKSIZES,
    CODES,
    NestedAbsmax,
    NestedTables,
    QuantState,
    codes_of,
    expand_nested_absmax,
    parse_quant_state,
)

PLAIN = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [1024, 512]}
NESTED = PLAIN | {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 2.5}
HUGE = 10**400


def raw(fields):
    return json.dumps(fields).encode()


def as_written(state, shape):
    """The tensors that bitsandbytes saves for a weight of ``shape``, and the bytes of the JSON among them."""
    state.shape = torch.Size(shape)
    tensors = state.as_dict(packed=True)
    return tensors, bytes(tensors[f"quant_state.bitsandbytes__{state.quant_type}"].tolist())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("quant_type", CODES)
def test_what_bitsandbytes_writes_is_read(quantise, quant_type, nested, blocksize, dtype):
    shape = (33, 130)
    packed, state = quantise(shape, quant_type, blocksize, nested, dtype)
    tensors, json_bytes = as_written(state, shape)
    parsed = parse_quant_state(json_bytes)
    second = ((NestedAbsmax(state.absmax.numel(), 256),), state.offset.item()) if nested else ()
    assert parsed == QuantState(quant_type, blocksize, shape, *second)
    assert parsed.numel == 33 * 130
    assert parsed.packed_bytes == packed.numel()
    assert parsed.absmax_count == tensors["absmax"].numel()


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (7, 33), (1, 65), (64, 64)])
def test_sizes_are_those_of_bitsandbytes_for_any_shape(quantise, shape):
    packed, state = quantise(shape)
    parsed = parse_quant_state(as_written(state, shape)[1])
    assert parsed.packed_bytes == packed.numel()
    assert parsed.absmax_count == state.absmax.numel()


@pytest.mark.parametrize("quant_type", CODES)
def test_the_code_tables_are_those_of_bitsandbytes(quant_type):
    ours = torch.tensor(CODES[quant_type], dtype=torch.float32)
    assert torch.equal(ours, bnb.get_4bit_type(quant_type, device="cpu"))


NOT_JSON = {
    "nothing": b"",
    "half": b'{"quant_type": "nf4", ',
    "not UTF-8": b'{"quant_type": "\xff"}',
    "deep": b"[" * 100_000,
    "a number of 5000 digits": b'{"blocksize": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("content", NOT_JSON.values(), ids=NOT_JSON)
def test_bytes_that_are_not_json_are_refused(content):
    with pytest.raises(ValueError, match="its quant state is not readable as JSON"):
        parse_quant_state(content)


@pytest.mark.parametrize(("document", "kind"), [([], "list"), ("nf4", "str"), (64, "int"), (None, "NoneType")])
def test_json_that_is_no_object_is_refused(document, kind):
    with pytest.raises(ValueError, match=f"its quant state is a JSON {kind}, not an object"):
        parse_quant_state(raw(document))


MALFORMED = {
    "quant_type": [None, "int8", "NF4", "", 4, True, ["nf4"], {"nf4": 1}],
    "blocksize": [None, 0, -64, 16, 65, 8192, 64.0, "64", True, [64], HUGE],
    "shape": [None, [], [64], [1, 2, 3], 64, "64", [0, 64], [64, -64], [64.0, 64], [True, 64], [1, "2"], [HUGE, 1]],
    "nested_blocksize": [None, 0, -256, 16, 255, 1 << 40, 256.0, "256", True, [256], HUGE],
    "nested_offset": [None, "2.5", True, [2.5], float("nan"), float("inf"), -float("inf"), 1e39, HUGE, -HUGE],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in MALFORMED for value in MALFORMED[field]])
def test_a_malformed_field_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=re.escape(f"its quant state says {field} {value!r}"[:60])):
        parse_quant_state(raw(NESTED | {field: value}))


@pytest.mark.parametrize("field", ["quant_type", "blocksize", "shape", "nested_offset"])
def test_a_missing_field_is_refused_by_name(field):
    fields = {key: value for key, value in NESTED.items() if key != field}
    with pytest.raises(ValueError, match=f"its quant state says {field} None"):
        parse_quant_state(raw(fields))


def test_a_whole_number_is_an_offset():
    assert parse_quant_state(raw(NESTED | {"nested_offset": 2})).nested_offset == 2.0


def test_the_source_dtype_does_not_matter():
    assert parse_quant_state(raw(PLAIN | {"dtype": "float8"})) == parse_quant_state(raw(PLAIN))


def expanded(nested, codes, *tables):
    absmax = torch.empty(codes.numel())
    codes_of(absmax).copy_(codes)
    expand_nested_absmax(nested, absmax, NestedTables(*tables))
    return absmax


@pytest.mark.parametrize("blocks", [1, 2, 255, 256, 257, 511, 512, 1000, (1 << 16) + 300, 3 << 16])
def test_expanded_absmax_is_bit_equal_to_bitsandbytes(quantise, fp32_absmax, blocks):
    _, state = quantise((blocks, 64), nested=True)
    tensors, json_bytes = as_written(state, (blocks, 64))
    parsed = parse_quant_state(json_bytes)
    tables = (tensors["nested_absmax"], tensors["nested_quant_map"], torch.tensor([parsed.nested_offset]))
    ours = expanded(*parsed.nested, tensors["absmax"], *tables)
    assert torch.equal(ours, fp32_absmax(state))


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_absmax_nested_in_other_blocksizes_is_bit_equal_too(blocksize):
    absmax = torch.rand(70_000, generator=torch.Generator().manual_seed(0))
    offset = absmax.mean()
    codes, state = bnb.quantize_blockwise(absmax - offset, blocksize=blocksize)
    ours = expanded(NestedAbsmax(70_000, blocksize), codes, state.absmax, state.code, offset.view(1))
    assert torch.equal(ours, bnb.dequantize_blockwise(codes, state) + offset)
