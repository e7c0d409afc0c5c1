"""The kernels that bring a 4-bit weight to rotated int8 rows: their arithmetic, by Triton's interpreter, and that they
compile."""

import logging

import comfy_kitchen
import pytest
import torch
from interpreted_kernel import interpreted

from flux_nf4.low_rank.branch import Patch
from flux_nf4.nf4_loader.checkpoint.quant_state import QuantState
from flux_nf4.nf4_loader.linear import by_table, int8_weight
from flux_nf4.nf4_loader.linear.kitchen import GROUP

SHAPE = (48, 512)
GPU = (torch.device("meta"), torch.bfloat16)
SHARED_MEMORY = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 120: 99}
"""KiB that a block of threads may have, by compute capability (CUDA C++ Programming Guide, table 30)."""


@pytest.fixture(name="interpreted")
def _interpreted():
    with interpreted("int8_weight") as module:
        yield module


def weight(quant_type="nf4", blocksize=64):
    generator = torch.Generator().manual_seed(0)
    numel = SHAPE[0] * SHAPE[1]
    packed = torch.randint(256, (numel // 2,), generator=generator, dtype=torch.uint8)
    return packed, torch.rand(numel // blocksize, generator=generator), QuantState(quant_type, blocksize, SHAPE)


def patches(*ranks):
    """For a third of the rows each, of different ranks."""
    generator = torch.Generator().manual_seed(1)
    for index, rank in enumerate(ranks):
        up = torch.randn(SHAPE[0] // len(ranks), rank, generator=generator).half()
        down = torch.randn(rank, SHAPE[1], generator=generator).half()
        yield Patch(index * len(up), up, down, torch.linspace(0.1, 0.2, rank))


def rows_of(module, args, added=(), row_scale=None):
    row_scale = torch.zeros(SHAPE[0]) if row_scale is None else row_scale
    rows = torch.empty(SHAPE, dtype=torch.int8)
    module.write_int8_rows(*args, torch.float16, added, row_scale, rows)
    return rows, row_scale


def dense(args, added=()):
    plain = by_table.dequantise(*args, torch.float32)
    for start, up, down, scale in added:
        plain[start : start + len(up)] += (up.float() * scale) @ down.float()
    return plain


def by_kitchen(weight):
    quantise = comfy_kitchen.registry.get_implementation("quantize_int8_convrot_weight", backend="eager")
    rows, scale = quantise(weight, GROUP)
    return rows, scale[:, 0]


@pytest.mark.parametrize("ranks", [(), (16,), (4, 10, 16)], ids=["plain", "one patch", "q k v apart"])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_rows_are_those_of_comfy_kitchen(interpreted, quant_type, blocksize, ranks):
    args, added = weight(quant_type, blocksize), list(patches(*ranks))
    assert interpreted.takes(SHAPE)
    rows, scale = rows_of(interpreted, args, added)
    expected_rows, expected_scale = by_kitchen(dense(args, added))
    torch.testing.assert_close(scale, expected_scale, rtol=5e-3, atol=0)
    difference = (rows.int() - expected_rows.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.05


def test_a_row_of_zeros_stays_one(interpreted):
    packed, absmax, state = weight()
    absmax[: SHAPE[1] // 64] = 0
    rows, scale = rows_of(interpreted, (packed, absmax, state))
    assert not rows[0].any()
    assert scale[0] > 0


def test_scales_that_are_there_are_taken(interpreted):
    args = weight()
    known, scale = rows_of(interpreted, args)
    again, same = rows_of(interpreted, args, row_scale=scale.clone())
    assert torch.equal(known, again)
    assert torch.equal(scale, same)
    coarse, doubled = rows_of(interpreted, args, row_scale=2 * scale)
    assert torch.equal(doubled, 2 * scale)
    assert coarse.abs().max() == 64


@pytest.mark.parametrize(("kernel", "ranks"), [("scales_kernel", 0), ("rows_kernel", 12)])
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_they_compile_and_fit_gpus_of(capability, kernel, ranks, tmp_path, monkeypatch):
    made = compiled_for(capability, kernel, ranks, tmp_path, monkeypatch)
    assert "cubin" in made.asm
    assert made.metadata.shared <= SHARED_MEMORY[capability] << 10


def compiled_for(capability, kernel, ranks, tmp_path, monkeypatch):
    """``kernel`` as Triton compiles it for a GPU of ``capability``."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from flux_nf4.nf4_loader.linear import int8_weight_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    dtype = "fp16" if capability == 75 else "bf16"  # what ComfyUI computes Flux in there
    sizes = {"RANKS": ranks, "GROUPS": 12, "BLOCK_BYTES": 32, "ROWS": int8_weight.ROWS, "MOST": 16}
    signature = {"packed": "*u8"} | dict.fromkeys(("absmax", "code", "scale", "row_scale"), "*fp32")
    signature |= dict.fromkeys(("hadamard", "up", "down"), f"*{dtype}")
    signature |= {"start": "i32"} | dict.fromkeys(sizes, "constexpr")
    signature |= {"out": "*i8"} if kernel == "rows_kernel" else {}
    source = ASTSource(getattr(int8_weight_kernel, kernel), signature, sizes)
    options = {"num_warps": int8_weight.WARPS}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize(
    ("shape", "takes"),
    [((48, 512), True), ((48, 384), False), ((40, 512), False), ((2**20, 2048), False)],
    ids=["fits", "no whole groups", "odd rows", "more than an int32 counts"],
)
def test_what_it_takes(shape, takes):
    assert int8_weight.takes(shape) == takes


@pytest.mark.parametrize(
    ("pieces", "takes"), [([(48, 16), (16, 4)], True), ([(48, 17)], False), ([(24, 4), (24, 4)], False)]
)
def test_which_patches_it_takes(pieces, takes):
    assert int8_weight.takes_patches(pieces) == takes


@pytest.fixture(autouse=True)
def untried():
    int8_weight.works_on.cache_clear()
    yield
    int8_weight.works_on.cache_clear()


def test_where_triton_fails_it_is_said_once_and_not_used(interpreted, monkeypatch, caplog):
    def no_compiler(*_):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(interpreted, "_trial", no_compiler)
    with caplog.at_level(logging.INFO):
        assert not interpreted.works_on(*GPU)
        assert not interpreted.works_on(*GPU)
    assert [record.getMessage() for record in caplog.records] == [
        "Triton cannot be used here (RuntimeError: no C compiler): int8 weights take longer to prepare"
    ]


def test_a_lack_of_memory_is_no_answer(interpreted, monkeypatch):
    def no_room(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(interpreted, "_trial", no_room)
        with pytest.raises(torch.OutOfMemoryError):
            interpreted.works_on(*GPU)
    monkeypatch.setattr(interpreted, "_trial", lambda *_: None)
    assert interpreted.works_on(*GPU)


@pytest.mark.parametrize("broken", ["no patches", "no rotation", "half the scale"])
def test_the_trial_passes_with_the_kernels_and_fails_with_others(broken, interpreted, monkeypatch):
    arguments = torch.device("cpu"), torch.float16
    assert interpreted._trial(*arguments) is None
    whole = interpreted.write_int8_rows

    def other(*args):
        *args, patches, row_scale, rows = args
        whole(*args, () if broken == "no patches" else patches, row_scale, rows)
        if broken == "half the scale":
            row_scale /= 2

    monkeypatch.setattr(interpreted, "write_int8_rows", other)
    if broken == "no rotation":
        monkeypatch.setattr(interpreted, "_hadamard", lambda dtype, device: torch.eye(16, dtype=dtype))
        monkeypatch.setattr(interpreted, "rotated", _rotated_by_kitchen)
    assert interpreted._trial(*arguments) == "its kernels give other values"


def _rotated_by_kitchen(weight):
    implementation = comfy_kitchen.registry.get_implementation("rotate_int8_convrot_weight", backend="eager")
    return implementation(weight, GROUP)


def test_the_rotation_is_that_of_comfy_kitchen():
    weight = torch.randn(4, 1024, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(int8_weight.rotated(weight), _rotated_by_kitchen(weight), rtol=1e-5, atol=1e-5)
