"""The kernels that add a LoRA to a matmul's output: their values, by Triton's interpreter, and that they compile."""

import importlib
import logging

import pytest
import torch
from corrected_interpreter import correct

from flux_nf4.low_rank import beside
from flux_nf4.low_rank.branch import LowRank
from flux_nf4.low_rank.factors import Factors

GPU = (torch.device("meta"), torch.bfloat16)
SHARED_MEMORY = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 120: 99}
"""KiB that a block of threads may have, by compute capability (CUDA C++ Programming Guide, table 30)."""

ROUNDINGS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Half of the distance of two numbers, beside them."""


@pytest.fixture
def interpreted(monkeypatch):
    """`beside`, with its kernels interpreted, on small tiles."""
    tl = pytest.importorskip("triton").language
    name = "flux_nf4.low_rank.beside_kernel"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        # Triton's own functions are interpreted only where that was asked for before it was imported.
        patch.setattr(tl, "sum", lambda input, axis: tl.reduce(input, axis, tl.standard._sum_combine))
        kernels = importlib.reload(importlib.import_module(name))
        correct(patch)
        for kernel in ("down_kernel", "up_kernel"):
            patch.setattr(beside, kernel, getattr(kernels, kernel))
        for size, small in {"_DOWN_ROWS": 16, "_DOWN_COLUMNS": 32, "_UP_ROWS": 16, "_UP_COLUMNS": 32}.items():
            patch.setattr(beside, size, small)
        patch.setattr(beside, "_PROGRAMS", 12)
        yield beside
    importlib.reload(importlib.import_module(name))


@pytest.fixture(autouse=True)
def untried():
    beside.works_on.cache_clear()
    yield
    beside.works_on.cache_clear()


def tensors(rows, columns, out, ranks, dtype):
    """output, input, down and up as large as 1, and scales that differ."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    down, up = randn(ranks, columns) / columns**0.5, randn(out, ranks) / ranks**0.5
    scale = torch.rand(ranks, generator=generator) + 0.5
    return *(tensor.to(dtype) for tensor in (randn(rows, out), randn(rows, columns), down, up)), scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("ranks", [1, 4, 10, 16])
@pytest.mark.parametrize("out", [33, 128])
@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (37, 176), (64, 512)], ids=["one row", "odd rows", "whole"])
def test_the_product_is_added_within_rounding(interpreted, rows, columns, out, ranks, dtype):
    output, input, down, up, scale = tensors(rows, columns, out, ranks, dtype)
    found = output.clone()
    interpreted.add(found, input, down, up, scale)
    hidden = input.float() @ down.float().t() * scale
    product, before = hidden @ up.float().t(), output.float()
    # The scaled sums are rounded, and the result. Anything else is far smaller.
    most = ROUNDINGS[dtype] * (hidden.abs() @ up.float().abs().t() + (before + product).abs()) + 1e-5
    assert bool(((found.float() - before - product).abs() <= most * (1 + ROUNDINGS[dtype])).all())


def test_columns_of_a_wider_output_get_it_and_no_others(interpreted):
    _, input, down, up, scale = tensors(21, 64, 48, 16, torch.float16)
    whole = torch.ones(21, 160, dtype=torch.float16)
    interpreted.add(whole[:, 80:128], input, down, up, scale)
    assert bool((whole[:, :80] == 1).all() and (whole[:, 128:] == 1).all())
    product = (input.float() @ down.float().t() * scale) @ up.float().t()
    torch.testing.assert_close(whole[:, 80:128].float(), 1 + product, rtol=5e-3, atol=5e-3)


def test_the_columns_of_the_input_are_shared_out_among_programs(monkeypatch):
    launches = []
    monkeypatch.setattr(beside, "launch", lambda kernel, grid, *_, **__: launches.append((kernel, grid)))
    for rows, columns in ((512, 3072), (4096, 3072), (4608, 15360), (10**5, 16), (512, 128)):
        beside.add(*tensors(rows, columns, 16, 16, torch.float16))
    grids = [grid[:2] for kernel, grid in launches if kernel is beside.down_kernel]
    assert grids == [(8, 16), (64, 4), (72, 2), (1563, 1), (8, 2)]


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("half", ["down", "up"])
def test_they_compile_and_fit_gpus_of(capability, half, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from flux_nf4.low_rank import beside_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(beside_kernel, f"{half}_kernel")
    dtype = "fp16" if capability == 75 else "bf16"
    rows, columns = (getattr(beside, f"_{half.upper()}_{side}") for side in ("ROWS", "COLUMNS"))
    for ranks in (4, beside.MOST_RANKS):
        sizes = {"SPLITS": beside._MOST_SPLITS, "RANKS": ranks, "PADDED": 16, "ROWS": rows, "COLUMNS": columns}
        sizes = {name: size for name, size in sizes.items() if name in kernel.arg_names}
        kinds = dict.fromkeys(("x", "down", "up", "output"), f"*{dtype}") | dict.fromkeys(("sums", "scale"), "*fp32")
        signature = {name: kinds.get(name, "constexpr" if name in sizes else "i32") for name in kernel.arg_names}
        # What Triton finds out of the arguments: all are multiples of 16.
        whole = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name not in sizes}
        options = {"num_warps": getattr(beside, f"_{half.upper()}_WARPS")}
        options |= {"num_stages": 4} if half == "down" else {}
        target = GPUTarget("cuda", capability, 32)
        made = triton.compile(ASTSource(kernel, signature, sizes, whole), target=target, options=options)
        assert "cubin" in made.asm
        assert made.metadata.shared <= SHARED_MEMORY[capability] << 10


# Where they are used


@pytest.fixture
def added(monkeypatch):
    """The tensors of each call, in place of what is launched."""
    calls = []
    monkeypatch.setattr(beside, "works_on", lambda device, dtype: True)
    monkeypatch.setattr(beside, "add", lambda *tensors: calls.append(tensors))
    return calls


def branch_of(*parts, columns=32):
    """A branch with a piece of each (first row, rows, rank)."""
    made = [Factors(torch.ones(rows, rank), torch.ones(rank, columns), 0.5, start) for start, rows, rank in parts]
    return LowRank(made, torch.bfloat16)


def test_many_rows_are_left_to_the_kernels(added):
    branch, output = branch_of((8, 16, 4)), torch.ones(256, 24).bfloat16()
    with torch.inference_mode():
        branch.add_to(output, torch.ones(256, 32).bfloat16(), branch.tensors)
    ((to, _, down, up, scale),) = added
    assert (to.data_ptr(), to.shape) == (output[:, 8:].data_ptr(), (256, 16))
    assert (down.shape, up.shape, scale.tolist()) == ((4, 32), (16, 4), [0.5] * 4)


@pytest.mark.parametrize(
    ("rows", "rank", "dtype", "with_gradients", "is_contiguous"),
    [
        (255, 4, torch.bfloat16, False, True),
        (256, 17, torch.bfloat16, False, True),
        (256, 4, torch.float32, False, True),
        (256, 4, torch.bfloat16, True, True),
        (256, 4, torch.bfloat16, False, False),
    ],
    ids=["few rows", "a large rank", "fp32", "gradients", "columns of a wider input"],
)
def test_all_else_is_left_to_torch(added, rows, rank, dtype, with_gradients, is_contiguous):
    branch = branch_of((0, 24, rank))
    output, input = torch.zeros(rows, 24, dtype=dtype), torch.ones(rows, 64, dtype=dtype)[:, :32]
    if is_contiguous:
        input = input.contiguous()
    with torch.set_grad_enabled(with_gradients):
        branch.add_to(output, input, branch.tensors)
    assert added == []
    assert bool((output == 0.5 * 32 * rank).all())


# Whether they can be used


def test_where_triton_fails_it_is_said_once_and_not_used(interpreted, monkeypatch, caplog):
    def no_compiler(*_):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(interpreted, "_trial", no_compiler)
    with caplog.at_level(logging.INFO):
        assert not interpreted.works_on(*GPU)
        assert not interpreted.works_on(*GPU)
    assert [record.getMessage() for record in caplog.records] == [
        "Triton cannot be used here (RuntimeError: no C compiler): LoRA beside quantised matmuls takes a few percent "
        "longer"
    ]


@pytest.mark.parametrize("broken", ["the last ranks", "the scale", "the last row"])
def test_the_trial_passes_with_the_kernels_and_fails_with_others(broken, interpreted, monkeypatch):
    arguments = torch.device("cpu"), torch.bfloat16
    assert interpreted._trial(*arguments) is None
    whole = interpreted.add

    def other(output, input, down, up, scale):
        before = output.clone()
        scale = torch.ones_like(scale) if broken == "the scale" else scale
        ranks = slice(0, 8 if broken == "the last ranks" else 16)
        whole(output, input, down[ranks], up[:, ranks].contiguous(), scale[ranks])
        if broken == "the last row":
            output[-1] = before[-1]

    monkeypatch.setattr(interpreted, "add", other)
    assert interpreted._trial(*arguments) == "its kernels give other values"
