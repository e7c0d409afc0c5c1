"""The kernel that expands a weight with a LoRA in it: its arithmetic, by Triton's interpreter, and that it compiles."""

import logging

import pytest
import torch
from interpreted_kernel import interpreted
from own_python import run_script

from flux_nf4.low_rank.branch import Patch
from flux_nf4.nf4_loader.checkpoint.quant_state import QuantState
from flux_nf4.nf4_loader.linear import by_table, patched_weight

SHAPE = (48, 128)
NEW = (torch.device("meta"), torch.bfloat16)


@pytest.fixture(name="interpreted")
def _interpreted():
    with interpreted() as module:
        yield module


def weight(quant_type="nf4", blocksize=64, shape=SHAPE):
    generator = torch.Generator().manual_seed(0)
    numel = shape[0] * shape[1]
    packed = torch.randint(256, (numel // 2,), generator=generator, dtype=torch.uint8)
    return packed, torch.rand(numel // blocksize, generator=generator), QuantState(quant_type, blocksize, shape)


def patches(ranks, dtype, strength=0.5):
    """For a third of the rows each, of different ranks."""
    generator = torch.Generator().manual_seed(1)
    for index, rank in enumerate(ranks):
        up = torch.randn(SHAPE[0] // len(ranks), rank, generator=generator).to(dtype)
        down = torch.randn(rank, SHAPE[1], generator=generator).to(dtype)
        yield Patch(index * len(up), up, down, torch.linspace(strength, 2 * strength, rank))


def expected(args, added):
    plain = by_table.dequantise(*args, torch.float32)
    for start, up, down, scale in added:
        plain[start : start + len(up)] += (up.float() * scale) @ down.float()
    return plain


@pytest.mark.parametrize("ranks", [(16,), (4, 10, 16)], ids=["one patch", "q k v apart"])
@pytest.mark.parametrize("blocksize", [32, 64, 4096 // 32])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_patches_are_in_the_weight(interpreted, quant_type, blocksize, ranks):
    args, added = weight(quant_type, blocksize), list(patches(ranks, torch.float16))
    assert interpreted.takes(SHAPE, torch.float16, [len(patch.up) for patch in added], ranks)
    found = interpreted.expand(*args, torch.float16, added)
    wanted = expected(args, added)
    assert (found.float() - wanted).norm() / wanted.norm() < 5e-4  # scaled factors and the sum are fp16


def test_at_no_strength_it_is_the_plain_weight(interpreted):
    args = weight()
    found = interpreted.expand(*args, torch.float16, patches((16,), torch.float16, strength=0.0))
    assert torch.equal(found, by_table.dequantise(*args, torch.float16))


@pytest.mark.parametrize("capability", [75, 80, 89, 90, 120])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_it_compiles_for_gpus_of(capability, dtype, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from flux_nf4.nf4_loader.linear.patched_weight_kernel import kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sizes = {"RANKS": 12, "BLOCK_BYTES": 32, "ROWS": 16, "BYTES": 32, "MOST": 16}
    signature = {"packed": "*u8"} | dict.fromkeys(("absmax", "code", "scale"), "*fp32")
    signature |= dict.fromkeys(("up", "down", "out"), f"*{dtype}")
    signature |= dict.fromkeys(("start", "row_bytes"), "i32") | dict.fromkeys(sizes, "constexpr")
    made = triton.compile(ASTSource(kernel, signature, sizes), target=GPUTarget("cuda", capability, 32))
    assert "cubin" in made.asm


@pytest.mark.parametrize(
    ("shape", "dtype", "rows", "ranks", "takes"),
    [
        ((48, 128), torch.bfloat16, (48,), (16,), True),
        ((48, 128), torch.bfloat16, (48,), (17,), False),
        ((48, 128), torch.float32, (48,), (16,), False),
        ((48, 96), torch.bfloat16, (48,), (16,), False),
        ((48, 128), torch.bfloat16, (24, 24), (16, 16), False),
    ],
    ids=["fits", "many ranks", "fp32", "odd columns", "odd rows"],
)
def test_what_it_takes(shape, dtype, rows, ranks, takes):
    assert patched_weight.takes(shape, dtype, rows, ranks) == takes


@pytest.fixture(autouse=True)
def untried():
    patched_weight.works_on.cache_clear()
    yield
    patched_weight.works_on.cache_clear()


def test_where_triton_fails_it_is_said_once_and_not_used(interpreted, monkeypatch, caplog):
    def no_compiler(*_):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(interpreted, "_trial", no_compiler)
    with caplog.at_level(logging.INFO):
        assert not interpreted.works_on(*NEW)
        assert not interpreted.works_on(*NEW)
    assert [record.getMessage() for record in caplog.records] == [
        "Triton cannot be used here (RuntimeError: no C compiler): LoRA takes a few percent longer"
    ]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("Triton Error [CUDA]: out of memory")]
)
def test_a_lack_of_memory_is_no_answer(interpreted, monkeypatch, error):
    def no_room(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(interpreted, "_trial", no_room)
        with pytest.raises(type(error)):
            interpreted.works_on(*NEW)
    monkeypatch.setattr(interpreted, "_trial", lambda *_: None)
    assert interpreted.works_on(*NEW)


def test_without_triton_the_package_loads_and_says_so(tmp_path):
    (tmp_path / "triton.py").write_text("raise ModuleNotFoundError")
    said = run_script(
        f"""
        sys.path.insert(0, {str(tmp_path)!r})
        from flux_nf4.nf4_loader.linear import patched_weight
        print(patched_weight.problem_on(torch.device("meta"), torch.bfloat16))
        """
    )
    assert " ".join(said) == "it is not installed"


@pytest.mark.parametrize("kept", [slice(0, 0), slice(0, 1), slice(1, 2)], ids=["no patch", "the first", "the second"])
def test_the_trial_passes_with_the_kernel_and_fails_without_its_patches(interpreted, monkeypatch, kept):
    arguments = torch.device("cpu"), torch.float16
    assert interpreted._trial(*arguments) is None
    whole = interpreted.expand

    def without(*args):
        *weight, patches = args
        left = [patch if patch in patches[kept] else patch._replace(scale=0 * patch.scale) for patch in patches]
        return whole(*weight, left)

    monkeypatch.setattr(interpreted, "expand", without)
    assert interpreted._trial(*arguments) == "its kernel gives other values"
