"""The kernel that expands a weight: its bits, by Triton's interpreter, and what it compiles to."""

import logging

import pytest
import torch
from corrected_interpreter import correct
from interpreted_kernel import interpreted

from flux_nf4.nf4_loader.checkpoint.quant_state import NestedAbsmax, NestedTables, QuantState
from flux_nf4.nf4_loader.linear import by_table, expanded_weight, kernels, matmul
from flux_nf4.nf4_loader.linear.linear4bit import Linear4bit

GPU = (torch.device("meta"), torch.bfloat16)


@pytest.fixture(name="interpreted")
def _interpreted(monkeypatch):
    with interpreted("expanded_weight") as module:
        correct(monkeypatch)
        yield module


@pytest.fixture(autouse=True)
def untried():
    expanded_weight.works_on.cache_clear()
    yield
    expanded_weight.works_on.cache_clear()


def weight(shape, quant_type="nf4", blocksize=64, nested=False):
    """packed, absmax, state, tables, and the absmax that they say."""
    generator = torch.Generator().manual_seed(0)
    state = QuantState(quant_type, blocksize, shape)
    packed = torch.randint(256, (state.packed_bytes,), generator=generator, dtype=torch.uint8)
    absmax = torch.rand(state.absmax_count, generator=generator) + 0.01
    if not nested:
        return packed, absmax, state, None, absmax
    codes = torch.randint(256, (state.absmax_count,), generator=generator, dtype=torch.uint8)
    parts = (NestedAbsmax(state.absmax_count, 256),)
    state = QuantState(quant_type, blocksize, shape, parts)
    tables = NestedTables(*(torch.rand(size, generator=generator) for size in NestedTables.shapes(parts).values()))
    return packed, codes, state, tables, kernels.expand_absmax(parts[0], codes, tables)


def same_bits(found, expected):
    return found.dtype == expected.dtype and torch.equal(found.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("shape", [(1, 8), (64, 64), (37, 104), (1040, 64)], ids=str)
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_values_are_those_of_bitsandbytes_to_the_bit(interpreted, quant_type, nested, blocksize, shape):
    packed, absmax, state, tables, plain = weight(shape, quant_type, blocksize, nested)
    for dtype in (torch.bfloat16, torch.float16):
        assert interpreted.takes(state, dtype)
        found = interpreted.expand(packed, absmax, state, dtype, tables)
        assert found.shape == shape
        assert same_bits(found, by_table.dequantise(packed, plain, state, dtype))
        # Of FP4's -0.0, bitsandbytes makes 0.0 on some CPUs.
        assert torch.equal(found, kernels._dequantise_by_bitsandbytes(packed, plain, state, dtype))


def test_bytes_that_begin_inside_a_word_are_read_right(interpreted):
    packed, absmax, state, _, _ = weight((48, 64))
    moved = torch.cat([packed.new_zeros(1), packed])[1:]
    assert moved.data_ptr() % 4
    found = interpreted.expand(moved, absmax, state, torch.bfloat16, None)
    assert torch.equal(found, by_table.dequantise(packed, absmax, state, torch.bfloat16))


def test_nothing_is_written_beside_the_weight(interpreted, monkeypatch):
    """The last program has fewer words than the others."""
    packed, absmax, state, _, _ = weight((300, 8))
    buffer, empty = torch.full((300 * 8 + 4096,), 9.0).half(), torch.empty
    monkeypatch.setattr(torch, "empty", lambda shape, **_: buffer[: 300 * 8].view(shape))
    found = interpreted.expand(packed, absmax, state, torch.float16, None)
    monkeypatch.setattr(torch, "empty", empty)
    assert torch.equal(found, by_table.dequantise(packed, absmax, state, torch.float16))
    assert (buffer[300 * 8 :] == 9).all()


def compiled_for(capability, nested, tmp_path, monkeypatch):
    """The kernel as Triton compiles it for a GPU of ``capability`` and a weight as they are."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from flux_nf4.nf4_loader.linear.expanded_weight_kernel import kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    dtype = "fp16" if capability == 75 else "bf16"  # what ComfyUI computes Flux in there
    own = {"packed": "*u8", "absmax": "*u8" if nested else "*fp32", "out": f"*{dtype}", "words": "i32"}
    constants = {"BLOCK_WORDS": 8, "IS_NESTED": int(nested), "NESTED_BLOCK": 256, "WORDS": expanded_weight._WORDS}
    signature = {name: own.get(name, "constexpr" if name in constants else "*fp32") for name in kernel.arg_names}
    aligned = {(index,): [["tt.divisibility", 16]] for index in range(len(signature) - len(constants))}
    options = {"num_warps": expanded_weight._WARPS, "enable_fp_fusion": False}
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 120])
def test_it_compiles_for_gpus_of(capability, nested, tmp_path, monkeypatch):
    """And as it is meant to: stores are 16 bytes wide, threads exchange nothing, and what is rounded is rounded to the
    nearest, each time."""
    made = compiled_for(capability, nested, tmp_path, monkeypatch)
    lines = made.asm["ptx"].splitlines()
    stores = [line for line in lines if "st.global" in line]
    assert len(stores) == expanded_weight._WORDS // (32 * expanded_weight._WARPS)
    assert all("st.global.v4" in store for store in stores)
    assert made.metadata.shared == 64, "of shared memory it needs the table"
    assert "cvt.rn." in made.asm["ptx"]
    assert "cubin" in made.asm
    assert not any("fma." in line for line in lines)


@pytest.mark.parametrize(
    ("shape", "dtype", "takes"),
    [
        ((8, 64), torch.bfloat16, True),
        ((8, 64), torch.float16, True),
        ((8, 64), torch.float32, False),
        ((1, 12), torch.bfloat16, False),
        ((2**16, 2**15), torch.bfloat16, False),
    ],
    ids=["fits", "fp16", "fp32", "half a word", "more than an int32 counts"],
)
def test_what_it_takes(shape, dtype, takes):
    assert expanded_weight.takes(QuantState("nf4", 64, shape), dtype) == takes


@pytest.mark.parametrize(
    ("parts", "takes"),
    [((NestedAbsmax(8, 256),), True), ((NestedAbsmax(8, 128),), False), ((NestedAbsmax(8, 256),) * 2, False)],
    ids=["as written", "other blocks", "fused"],
)
def test_which_nested_absmax_it_takes(parts, takes):
    assert expanded_weight.takes_nested(parts) == takes


# Where it is used


@pytest.fixture
def launched(monkeypatch):
    """Dtypes of the absmax of each launch; the table computes in the kernel's place."""
    seen = []

    def launch(packed, absmax, tables, state, dtype):
        seen.append(absmax.dtype)
        if tables is not None:
            absmax = kernels.expand_absmax(NestedAbsmax(len(absmax), 256), absmax, tables)
        return by_table.dequantise(packed, absmax, state, dtype)

    monkeypatch.setattr(expanded_weight, "works_on", lambda device, dtype: True)
    monkeypatch.setattr(expanded_weight, "_launch", launch)
    return seen


@pytest.mark.parametrize(
    ("count", "blocksize", "seen"),
    [(0, 0, torch.float32), (1, 256, torch.uint8), (1, 128, torch.float32), (2, 256, torch.float32)],
    ids=["fp32", "nested", "nested in other blocks", "nested in parts"],
)
def test_absmax_is_expanded_before_if_the_kernel_cannot(launched, count, blocksize, seen):
    packed, absmax, state, _, _ = weight((16, 256))
    tables = None
    if count:
        parts = (NestedAbsmax(state.absmax_count // count, blocksize),) * count
        state = QuantState("nf4", 64, (16, 256), parts)
        absmax = (255 * absmax).to(torch.uint8)
        tables = NestedTables(*map(torch.ones, NestedTables.shapes(parts).values()))
    found = kernels.dequantise(packed, absmax, state, torch.bfloat16, tables)
    assert launched == [seen]
    plain = kernels.fp32_absmax(state, absmax, tables)
    assert torch.equal(found, by_table.dequantise(packed, plain, state, torch.bfloat16))


@pytest.mark.parametrize(
    ("rows", "shape", "expands"),
    [(257, (2048, 2048), True), (256, (2048, 2048), False), (257, (2047, 2048), False)],
    ids=["as bitsandbytes does", "few rows", "a small weight"],
)
def test_a_weight_is_expanded_where_bitsandbytes_would_expand_it(launched, monkeypatch, rows, shape, expands):
    """Elsewhere it may multiply with the packed weight."""
    monkeypatch.setattr(matmul.kernels, "has_gemm_4bit", lambda device: True)
    layer = Linear4bit([QuantState("nf4", 64, shape)], bias=False, dtype=torch.bfloat16, device="meta")
    layer(torch.empty(rows, shape[1], dtype=torch.bfloat16, device="meta"))
    assert len(launched) == int(expands)


GPUS = (
    (40, 7, 5),
    (108, 8, 0),
    (28, 8, 6),
    (84, 8, 6),
    (128, 8, 9),
    (24, 8, 9),
    (132, 9, 0),
    (148, 10, 0),
    (170, 12, 0),
)
"""Multiprocessors and compute capability: a T4, A100, 3060, 3090, 4090, 4060, H100, B200 and 5090."""


@pytest.mark.parametrize("gpu", [*GPUS, (20, 11, 0), (48, 12, 1)], ids=str)
def test_bitsandbytes_expands_it_there_on_every_gpu(gpu, monkeypatch):
    """What is installed: another version may choose otherwise, and then the bits would be others."""
    cuda = pytest.importorskip("bitsandbytes.backends.cuda.ops")
    monkeypatch.setattr(cuda, "_gpu_dispatch_props", lambda index: gpu)
    uses_packed = cuda._gemm_4bit_use_custom_cuda.__wrapped__
    for out, columns in (
        (2048, 2048),
        (3072, 3072),
        (9216, 3072),
        (21504, 3072),
        (3072, 15360),
        (64, 65536),
        (65536, 64),
    ):
        for rows in (257, 300, 512, 513, 1024, 1536):
            for dtype in expanded_weight.DTYPES:
                assert not uses_packed(0, dtype, rows, out, columns), (rows, out, columns, dtype)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_compiled_code_has_it_as_one_operator(launched, monkeypatch, nested):
    packed, absmax, state, tables, plain = weight((32, 64), nested=nested)

    def doubled(packed, absmax, tables):
        return 2 * kernels.dequantise(packed, absmax, state, torch.bfloat16, tables)

    torch.compiler.reset()
    compiled = torch.compile(doubled, backend="aot_eager", fullgraph=True)
    expected = 2 * by_table.dequantise(packed, plain, state, torch.bfloat16)
    with torch.inference_mode():
        for stance in ("default", "fail_on_recompile"):
            with torch.compiler.set_stance(stance):
                assert torch.equal(compiled(packed.clone(), absmax.clone(), tables), expected)
    assert len(launched) == 2


# Whether it can be used


def test_where_triton_fails_it_is_said_once_and_not_used(interpreted, monkeypatch, caplog):
    def no_compiler(*_):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(interpreted, "_trial", no_compiler)
    with caplog.at_level(logging.INFO):
        assert not interpreted.works_on(*GPU)
        assert not interpreted.works_on(*GPU)
    assert [record.getMessage() for record in caplog.records] == [
        "Triton cannot be used here (RuntimeError: no C compiler): 4-bit weights take a little longer to expand"
    ]


def test_on_a_cpu_nothing_is_said(caplog):
    with caplog.at_level(logging.INFO):
        assert not expanded_weight.works_on(torch.device("cpu"), torch.bfloat16)
    assert caplog.records == []


def test_a_lack_of_memory_is_no_answer(interpreted, monkeypatch):
    def no_room(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(interpreted, "_trial", no_room)
        with pytest.raises(torch.OutOfMemoryError):
            interpreted.works_on(*GPU)
    monkeypatch.setattr(interpreted, "_trial", lambda *_: None)
    assert interpreted.works_on(*GPU)


@pytest.mark.parametrize("broken", ["the first code", "the offset", "the last word"])
def test_the_trial_passes_with_the_kernel_and_fails_with_others(broken, interpreted, monkeypatch):
    arguments = torch.device("cpu"), torch.bfloat16
    assert interpreted._trial(*arguments) is None
    whole = interpreted.expand

    def other(packed, absmax, state, dtype, tables):
        if broken == "the offset" and tables is not None:
            tables = tables._replace(offset=0 * tables.offset)
        dense = whole(packed, absmax, state, dtype, tables)
        if broken == "the last word":
            dense.view(-1)[-8:] = 0
        if broken == "the first code":
            dense[0, 0] *= 1.01
        return dense

    monkeypatch.setattr(interpreted, "expand", other)
    assert interpreted._trial(*arguments) == "its kernel gives other values"
