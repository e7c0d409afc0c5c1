"""The two ways to dequantise: bit-equal to bitsandbytes, and there whether it is installed or not."""

import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional as bnb
from torch._subclasses import FakeTensorMode

from flux_nf4.nf4_loader.checkpoint.quant_state import BLOCKSIZES, CODES, NestedAbsmax, NestedTables, QuantState
from flux_nf4.nf4_loader.linear import by_table, kernels

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Flux with a hidden size of 64 instead of 3072, and one row length that is a whole number of blocks of any size.
FLUX_LAYERS = {
    "img_in": (64, 64),
    "txt_in": (64, 128),
    "vector_in.in_layer": (64, 96),
    "time_in.in_layer": (64, 256),
    "img_mod.lin": (384, 64),
    "img_attn.qkv": (192, 64),
    "img_mlp.0": (256, 64),
    "img_mlp.2": (64, 256),
    "linear1": (448, 64),
    "linear2": (64, 320),
    "final_layer.linear": (16, 64),
    "rows of 4096": (3, 4096),
}
ODD_SHAPES = {
    "one element": (1, 1),
    "three elements": (3, 1),
    "odd numel": (7, 33),
    "rows end inside a block": (64, 96),
    "last block is short": (5, 130),
    "rows below a block": (48, 16),
    "odd rows over many blocks": (33, 1029),
}
SHAPES = FLUX_LAYERS | ODD_SHAPES

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("quant_type", CODES)
def test_dequantised_weights_are_bit_equal_to_bitsandbytes(
    quantise, reference, fp32_absmax, quant_type, nested, blocksize, shape
):
    packed, state = quantise(shape, quant_type, blocksize, nested)
    absmax = fp32_absmax(state)
    for dtype in DTYPES:
        expected = reference(packed, state, shape, dtype)
        for function in (kernels.dequantise, by_table.dequantise):
            found = function(packed.view(-1), absmax, QuantState(quant_type, blocksize, shape), dtype)
            assert (found.shape, found.dtype) == (shape, dtype)
            assert torch.equal(found, expected), f"{function.__name__} in {dtype}"


def test_the_first_element_is_in_the_high_nibble():
    packed = torch.tensor([0x0F, 0x70], dtype=torch.uint8)
    absmax = torch.tensor([2.0])
    for function in (kernels.dequantise, by_table.dequantise):
        found = function(packed, absmax, QuantState("nf4", 64, (1, 4)), torch.float32)
        assert found.tolist() == [[-2.0, 2.0, 0.0, -2.0]]


def test_each_block_has_its_own_absmax():
    packed = torch.full((64,), 0xFF, dtype=torch.uint8)
    absmax = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for function in (kernels.dequantise, by_table.dequantise):
        found = function(packed, absmax, QuantState("nf4", 32, (2, 64)), torch.float32)
        assert torch.equal(found.view(-1), absmax.repeat_interleave(32))


@pytest.mark.parametrize("quant_type", CODES)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-5, 7e4, 3e38])
def test_extreme_absmax_is_bit_equal_in_both_ways(quant_type, scale):
    packed = torch.arange(256, dtype=torch.uint8)
    absmax = torch.full((8,), scale)
    for dtype in DTYPES:
        arguments = (packed, absmax, QuantState(quant_type, 64, (8, 64)), dtype)
        assert torch.equal(kernels.dequantise(*arguments), by_table.dequantise(*arguments))


def test_the_default_chunk_is_whole_blocks():
    assert all(2 * by_table._CHUNK_BYTES % blocksize == 0 for blocksize in BLOCKSIZES)


@pytest.mark.parametrize("packed_bytes", [2047, 2048, 2049, 4096, 3 * 2048 + 1, 9999])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_the_table_look_up_is_exact_over_chunk_boundaries(quantise, reference, monkeypatch, blocksize, packed_bytes):
    monkeypatch.setattr(by_table, "_CHUNK_BYTES", 2048)
    for numel in (2 * packed_bytes - 1, 2 * packed_bytes):
        packed, state = quantise((1, numel), "nf4", blocksize)
        expected = reference(packed, state, (1, numel), torch.bfloat16)
        how = QuantState("nf4", blocksize, (1, numel))
        found = by_table.dequantise(packed.view(-1), state.absmax, how, torch.bfloat16)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("has_kernels", [False, True], ids=["table", "kernels"])
def test_nested_absmax_is_expanded_bit_equal_to_bitsandbytes(monkeypatch, count, blocksize, has_kernels):
    absmax = torch.rand(count, generator=torch.Generator().manual_seed(count))
    offset = absmax.mean()
    codes, second = bnb.quantize_blockwise(absmax - offset, blocksize=blocksize)
    expected = bnb.dequantize_blockwise(codes, second) + offset
    monkeypatch.setattr(kernels, "_has_blockwise_kernel", lambda _: has_kernels)
    tables = NestedTables(second.absmax, second.code, offset.view(1))
    for _ in range(2):  # what it was given is as it was
        assert torch.equal(kernels.expand_absmax(NestedAbsmax(count, blocksize), codes, tables), expected)


# With and without bitsandbytes


@pytest.mark.parametrize(
    ("parts", "blocksize", "expanded"),
    [(1, 256, 0), (1, 128, 1), (2, 256, 2)],
    ids=["as in a file", "in other blocks", "of a fused weight"],
)
def test_bitsandbytes_multiplies_with_nested_absmax(monkeypatch, parts, blocksize, expanded):
    """It expands what it writes itself; the rest is expanded before."""
    shape, calls, expand = (16 * parts, 512), [], kernels.expand_absmax
    monkeypatch.setattr(kernels, "expand_absmax", lambda *args: calls.append(args) or expand(*args))
    random = torch.Generator().manual_seed(0)
    packed = torch.randint(256, (shape[0] * 256,), dtype=torch.uint8, generator=random)
    codes = torch.randint(256, (shape[0] * 8,), dtype=torch.uint8, generator=random)
    nested = (NestedAbsmax(16 * 8, blocksize),) * parts
    tables = NestedTables(*(torch.rand(size, generator=random) for size in NestedTables.shapes(nested).values()))
    state = QuantState("nf4", 64, shape, nested)
    input, bias = torch.randn(3, 512, generator=random), torch.randn(shape[0], generator=random)
    found = kernels.gemm_4bit(input, packed, codes, state, bias, tables)
    assert len(calls) == expanded
    with monkeypatch.context() as without:
        without.setattr(kernels, "_has_blockwise_kernel", lambda _: False)
        looked_up = kernels.gemm_4bit(input, packed, codes, state, bias, tables)
    assert len(calls) == expanded + parts
    torch.testing.assert_close(looked_up, found, rtol=1e-5, atol=1e-4)
    weight = kernels.dequantise(packed, kernels.fp32_absmax(state, codes, tables), state, torch.float32)
    torch.testing.assert_close(found, torch.nn.functional.linear(input, weight, bias), rtol=1e-5, atol=1e-4)


def test_nested_absmax_is_handed_over_as_compiling_asks_for_it(monkeypatch):
    """torch.compile runs bitsandbytes' checks of shapes, which a plain call leaves out."""
    monkeypatch.setattr(kernels, "_has_blockwise_kernel", lambda _: True)
    nested = (NestedAbsmax(16 * 8, 256),)
    state = QuantState("nf4", 64, (16, 512), nested)
    with FakeTensorMode():
        packed, codes = (torch.empty(size, dtype=torch.uint8) for size in (16 * 256, 16 * 8))
        tables = NestedTables(*(torch.empty(size) for size in NestedTables.shapes(nested).values()))
        found = kernels.gemm_4bit(torch.empty(3, 512), packed, codes, state, torch.empty(16), tables)
    assert found.shape == (3, 16)


@pytest.fixture
def untried():
    """Kernels that have not looked for bitsandbytes yet."""
    tried = (kernels._dequantise_for, kernels._maps_blockwise)
    for answer in tried:
        answer.cache_clear()
    yield
    for answer in tried:
        answer.cache_clear()


@pytest.fixture
def dequantise_equals_bitsandbytes(quantise, reference):
    """A function that checks `kernels.dequantise` on an ordinary weight, twice."""
    packed, state = quantise((64, 128))
    expected = reference(packed, state, (64, 128), torch.bfloat16)

    def check():
        for _ in range(2):
            found = kernels.dequantise(packed.view(-1), state.absmax, QuantState("nf4", 64, (64, 128)), torch.bfloat16)
            assert torch.equal(found, expected)

    return check


def zeros_of(packed, absmax, state, dtype):
    return torch.zeros(state.shape, dtype=dtype)


def no_kernel(*arguments):
    raise NotImplementedError("bitsandbytes::dequantize_4bit has no kernel for this device")


def wrong_for_fp4(packed, absmax, state, dtype):
    return by_table.dequantise(packed, absmax, replace(state, quant_type="nf4"), dtype)


@pytest.mark.usefixtures("untried")
def test_bitsandbytes_is_used_where_it_works(monkeypatch, caplog, dequantise_equals_bitsandbytes):
    assert kernels._bitsandbytes_problem(CPU) is None
    monkeypatch.setattr(kernels, "_bitsandbytes_problem", lambda device: None)
    monkeypatch.setattr(by_table, "dequantise", no_kernel)
    dequantise_equals_bitsandbytes()
    assert caplog.records == []


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize(
    ("broken_kernel", "reason"),
    [
        (zeros_of, "its nf4 kernel gives other values than the format says"),
        (wrong_for_fp4, "its fp4 kernel gives other values than the format says"),
        (no_kernel, "NotImplementedError: bitsandbytes::dequantize_4bit has no kernel for this device"),
    ],
)
def test_a_kernel_that_does_not_work_is_replaced_with_one_warning(
    monkeypatch, caplog, dequantise_equals_bitsandbytes, broken_kernel, reason
):
    monkeypatch.setattr(kernels, "_dequantise_by_bitsandbytes", broken_kernel)
    dequantise_equals_bitsandbytes()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"no bitsandbytes kernel for cpu ({reason})" in record.getMessage()


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize("broken_kernel", [lambda codes, _: torch.zeros(codes.shape), no_kernel])
def test_a_blockwise_kernel_that_does_not_work_is_not_used(
    monkeypatch, caplog, dequantise_equals_bitsandbytes, broken_kernel
):
    assert kernels._has_blockwise_kernel(CPU)
    kernels._maps_blockwise.cache_clear()
    monkeypatch.setattr(kernels, "_map_blockwise", broken_kernel)
    tables = NestedTables(torch.ones(1), torch.arange(256.0), torch.tensor([0.5]))
    found = kernels.expand_absmax(NestedAbsmax(2, 256), torch.arange(2, dtype=torch.uint8), tables)
    assert found.tolist() == [0.5, 1.5]
    monkeypatch.setattr(by_table, "dequantise", no_kernel)  # the 4-bit one is used as ever
    dequantise_equals_bitsandbytes()
    assert caplog.records == []


@pytest.mark.usefixtures("untried")
def test_a_device_without_a_blockwise_kernel_is_not_tried(monkeypatch):
    monkeypatch.setattr(kernels, "_has_kernels", lambda _: True)
    monkeypatch.setattr(kernels, "_map_blockwise", no_kernel)
    assert not kernels._has_blockwise_kernel(torch.device("mps"))


@pytest.mark.usefixtures("untried")
def test_a_device_on_which_they_do_not_work_is_no_verdict_on_another(monkeypatch):
    monkeypatch.setattr(kernels, "_bitsandbytes_problem", lambda device: None if device == CPU else "too old")
    assert kernels._has_kernels(CPU)
    assert not kernels._has_kernels(torch.device("cpu", 0))


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize("kernel", ["_dequantise_by_bitsandbytes", "_map_blockwise"])
def test_a_full_device_is_no_lack_of_kernels(monkeypatch, caplog, dequantise_equals_bitsandbytes, kernel):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    with monkeypatch.context() as full:
        full.setattr(kernels, kernel, out_of_memory)
        kernels.warm_up(torch.device("cpu"))
        with pytest.raises(torch.OutOfMemoryError):
            kernels._has_blockwise_kernel(CPU)
    assert kernels._has_blockwise_kernel(CPU)
    dequantise_equals_bitsandbytes()
    assert caplog.records == []


@pytest.mark.usefixtures("untried")
def test_bitsandbytes_that_is_not_installed_is_replaced_with_one_warning(
    monkeypatch, caplog, dequantise_equals_bitsandbytes
):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    dequantise_equals_bitsandbytes()
    assert not kernels._has_gemm_4bit(CPU)
    (record,) = caplog.records
    assert "pip install 'bitsandbytes>=0.50'" in record.getMessage()


WITHOUT_BITSANDBYTES = """
import sys

import package
import torch
from flux_nf4.nf4_loader.checkpoint import catalogue, header, quant_state, read
from flux_nf4.nf4_loader.linear import kernels, linear4bit

assert "bitsandbytes" not in sys.modules, "imported before anything was dequantised"
linear = linear4bit.Linear4bit([quant_state.QuantState("nf4", 64, (4, 64))], bias=False, dtype=torch.float32)
linear.packed_0.fill_(0xFF)
linear.absmax_0.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
assert linear(torch.ones(64)).tolist() == [64.0, 128.0, 192.0, 256.0]
assert torch.equal(linear.weight + 0, torch.tensor([[1.0], [2.0], [3.0], [4.0]]).expand(4, 64))
"""


def test_all_works_where_importing_bitsandbytes_fails(tmp_path):
    broken = tmp_path / "bitsandbytes"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    places = [str(tmp_path), str(Path(__file__).parents[2] / "commands")]
    script = f"import sys; sys.path[:0] = {places!r}\n{WITHOUT_BITSANDBYTES}"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("no bitsandbytes kernel for cpu (OSError: libcudart.so.13: cannot open") == 1
