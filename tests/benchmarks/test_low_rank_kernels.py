"""The trial of two kernels for a LoRA beside a matmul: their values and sizes, and what the trial says of them."""

import importlib
import json
import sys

import low_rank_kernels as script
import pytest
import torch
from corrected_interpreter import correct

SHARED_MEMORY = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 120: 99}
"""KiB that a block of threads may have, by compute capability (CUDA C++ Programming Guide, table 30)."""

ROUNDINGS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Half of the distance of two numbers, beside them."""


@pytest.fixture
def kernels(monkeypatch):
    """`low_rank_kernel`, with its kernels interpreted."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        module = importlib.reload(importlib.import_module("low_rank_kernel"))
        correct(patch)
        yield module
    importlib.reload(module)


def factors(rows, columns, out, ranks, dtype):
    """x, down, up and output, as large as 1, and scales that differ."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    made = (randn(rows, columns), randn(ranks, columns) / columns**0.5, randn(out, ranks) / ranks**0.5)
    scale = torch.rand(ranks, generator=generator) + 0.5
    return *(tensor.to(dtype) for tensor in made), randn(rows, out).to(dtype), scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("ranks", [4, 16, 20, 64, 128])
@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (37, 176), (64, 512)], ids=["one row", "odd rows", "whole"])
def test_the_sums_are_those_of_fp32(kernels, rows, columns, ranks, dtype):
    x, down, *_ = factors(rows, columns, 16, ranks, dtype)
    setting = kernels.Partial(16, 32, 12, 4, 2)
    sums = kernels.partial(x, down, setting)
    assert sums.shape == (kernels.splits_of(rows, columns, setting), rows, max(16, 1 << (ranks - 1).bit_length()))
    torch.testing.assert_close(sums.sum(0)[:, :ranks], x.float() @ down.float().t(), rtol=1e-5, atol=1e-5)
    assert not sums[:, :, ranks:].any()


def test_each_split_has_its_own_columns(kernels):
    x, down, *_ = factors(40, 160, 16, 16, torch.float16)
    sums = kernels.partial(x, down, kernels.Partial(16, 32, 6, 4, 2))
    for own, columns in zip(sums, (slice(0, 96), slice(96, 160)), strict=True):
        expected = x[:, columns].float() @ down[:, columns].float().t()
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("ranks", [4, 16, 20, 64, 128])
@pytest.mark.parametrize(("rows", "out", "tiles"), [(1, 16, 1), (37, 144, 2), (64, 128, 4)])
def test_both_add_the_product_within_rounding(kernels, rows, out, tiles, ranks, dtype):
    x, down, up, output, scale = factors(rows, 128, out, ranks, dtype)
    sums = kernels.partial(x, down, kernels.Partial(16, 32, 12, 4, 2))
    found = output.clone()
    kernels.add(found, sums, up, scale, kernels.Add(16, 32, tiles, 4, 2))
    hidden = x.float() @ down.float().t() * scale
    product = hidden @ up.float().t()
    # The scaled sums are rounded, and the result. Anything else is far smaller.
    most = ROUNDINGS[dtype] * (hidden.abs() @ up.float().abs().t() + (output.float() + product).abs()) + 1e-5
    assert bool(((found.float() - output.float() - product).abs() <= most * (1 + ROUNDINGS[dtype])).all())
    rounded = hidden.to(dtype).float() @ up.float().t()
    torch.testing.assert_close(found, (output.float() + rounded).to(dtype), rtol=2 * ROUNDINGS[dtype], atol=1e-3)


def test_columns_of_a_wider_output_get_it_and_no_others(kernels):
    x, down, up, _, scale = factors(21, 64, 48, 16, torch.float16)
    whole = torch.ones(21, 160, dtype=torch.float16)
    sums = kernels.partial(x, down, kernels.Partial(16, 32, 4, 4, 2))
    kernels.add(whole[:, 80:128], sums, up, scale, kernels.Add(16, 32, 1, 4, 1))
    product = (x.float() @ down.float().t() * scale) @ up.float().t()
    torch.testing.assert_close(whole[:, 80:128].float(), 1 + product, rtol=5e-3, atol=5e-3)
    assert bool((whole[:, :80] == 1).all() and (whole[:, 128:] == 1).all())


def test_the_sums_are_added_in_their_order(kernels):
    """Else the same input would not give the same bits: 1 is lost beside 2**25 if it comes after it."""
    sums = torch.zeros(4, 16, 16)
    sums[:, :, 0] = torch.tensor([2.0**25, 1.0, -(2.0**25), 3.0])[:, None]
    output, up = torch.zeros(16, 16, dtype=torch.float16), torch.ones(16, 16, dtype=torch.float16)
    kernels.add(output, sums, up, torch.ones(16), kernels.Add(16, 16, 1, 4, 1))
    assert bool((output == 3).all())


def test_splits_are_as_many_as_fill_the_programs(kernels):
    setting = kernels.Partial(64, 128, 512, 4, 3)
    assert [kernels.splits_of(rows, 3072, setting) for rows in (512, 1024, 4096, 4608, 9216, 10**6)] == [
        16, 16, 8, 4, 2, 1
    ]  # fmt: skip
    assert kernels.splits_of(512, 640, setting) == 4


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("half", ["down", "up"])
def test_each_setting_compiles_and_fits_gpus_of(capability, half, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    module = importlib.import_module("low_rank_kernel")
    kernel, settings = {
        "down": (module.partial_kernel, module.PARTIALS),
        "up": (module.add_kernel, module.ADDS),
    }[half]
    dtype = "fp16" if capability == 75 else "bf16"
    assert len(settings) <= 8
    for setting in settings:
        sizes = {"RANKS": 16, "PADDED": 16, "ROWS": setting.rows, "COLUMNS": setting.columns}
        options = {"num_warps": setting.warps}
        if half == "down":
            options["num_stages"] = setting.stages
        else:
            sizes |= {"SPLITS": module.MOST_SPLITS, "TILES": setting.tiles, "STAGES": setting.stages}
        kinds = dict.fromkeys(("x", "down", "up", "output"), f"*{dtype}") | dict.fromkeys(("sums", "scale"), "*fp32")
        kinds |= dict.fromkeys(sizes, "constexpr")
        signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
        # What Triton finds out of the arguments: all are multiples of 16.
        whole = {
            (index,): [["tt.divisibility", 16]] for index, name in enumerate(kernel.arg_names) if name not in sizes
        }
        target = GPUTarget("cuda", capability, 32)
        made = triton.compile(ASTSource(kernel, signature, sizes, whole), target=target, options=options)
        assert "cubin" in made.asm
        assert made.metadata.shared <= SHARED_MEMORY[capability] << 10, setting


def rows_of_tiny(name, pixels):
    """One picture has 16 rows of text, and as many as its side of its own."""
    return [16 + side for side in pixels] if name.startswith("linear") else [16, *pixels]


@pytest.fixture
def tiny(kernels, monkeypatch):
    """The trial on the CPU: two layers, few rows, and times that say which call was timed first."""

    def device_ms(call, repeats):
        call()
        return next(ticks)

    ticks = iter(range(1, 1000))
    monkeypatch.setattr(script, "SHAPES", {"proj": (32, 64), "linear1": (48, 64)})
    monkeypatch.setattr(script, "rows_of_pictures", rows_of_tiny)
    monkeypatch.setattr(script, "TEXT_TOKENS", 16)
    monkeypatch.setattr(script, "host_us", lambda call: call() or 1.0)
    monkeypatch.setattr(script, "device_ms", device_ms)
    monkeypatch.setattr(script, "copy_gbps", lambda repeats: 1000.0)
    monkeypatch.setattr(script, "in_turn", lambda *shape: iter(lambda: torch.randn(shape).bfloat16(), None))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(kernels, "PARTIALS", (kernels.Partial(16, 32, 4, 4, 2), kernels.Partial(32, 32, 4, 4, 2)))
    monkeypatch.setattr(kernels, "ADDS", (kernels.Add(16, 32, 1, 4, 1), kernels.Add(32, 16, 2, 4, 2)))
    return kernels


def test_the_whole_trial_runs(tiny):
    with torch.inference_mode():
        result = script.measure(16, [20, 40], 1)
    assert script.wrong(result["rows"]) == []
    assert result["problems"] == {}
    assert [(row["layer"], row["rows"]) for row in result["rows"]] == [
        ("proj", 16), ("proj", 20), ("proj", 40), ("linear1", 36), ("linear1", 56)
    ]  # fmt: skip
    assert result["best"] == {"down": "16/32/4/4/2", "up": "16/32/1/4/1"}
    assert json.loads(json.dumps(result))["rows"] == result["rows"]
    for row in result["rows"]:
        assert set(row["down"]) == {"torch", "16/32/4/4/2", "32/32/4/4/2"}
        assert 0 < row["errors"]["Triton"] < 0.01
    assert len([line for line in script.table(result).splitlines() if line.startswith(("| proj", "| linear1"))]) == 5


def test_a_setting_that_fails_is_told_once_and_another_is_chosen(tiny, monkeypatch, capsys):
    failing, works = tiny.PARTIALS
    partial, tried = tiny.partial, []

    def partial_or_not(x, down, setting):
        tried.append(setting)
        if setting == failing:
            raise RuntimeError("out of resources")
        return partial(x, down, setting)

    monkeypatch.setattr(tiny, "partial", partial_or_not)
    with torch.inference_mode():
        result = script.measure(16, [20], 1)
    assert tried.count(failing) == 1
    assert result["problems"] == {"down 16/32/4/4/2": "16 rows, 64 columns: RuntimeError: out of resources"}
    assert capsys.readouterr().out == "down 16/32/4/4/2: 16 rows, 64 columns: RuntimeError: out of resources\n"
    assert result["best"]["down"] == script.name_of(works)


def test_wrong_values_are_told(tiny, monkeypatch):
    add = tiny.add

    def add_twice(output, sums, up, scale, setting):
        for _ in range(1 + (setting == tiny.ADDS[0])):
            add(output, sums, up, scale, setting)

    monkeypatch.setattr(tiny, "add", add_twice)
    with torch.inference_mode():
        result = script.measure(16, [20], 1)
    assert list(result["problems"]) == ["up 16/32/1/4/1"]
    assert "wrong values: error 0.99" in result["problems"]["up 16/32/1/4/1"]
    result["rows"][0]["errors"] = {"torch": 0.002, "Triton": 0.003}
    assert script.wrong(result["rows"]) == ["proj, 16 rows: wrong values: error 0.00300"]
    monkeypatch.setattr(tiny, "ADDS", tiny.ADDS[:1])
    with pytest.raises(SystemExit, match="no setting of add_kernel works"), torch.inference_mode():
        script.measure(16, [20], 1)


FIGURES = {
    "down": {"torch": 0.4, "a": 0.1, "b": 0.3},
    "up": {"torch": 0.5, "c": 0.2},
    "both": {"torch": 1.0, "Triton": 0.25},
    "bytes": {"down": 0.05, "up": 0.125},
    "errors": {"torch": 0.002, "Triton": 0.002},
}


@pytest.fixture
def found(monkeypatch):
    """A layer with rows for the picture and the text, and one with both together."""
    monkeypatch.setattr(script, "SHAPES", {"proj": (32, 64), "linear1": (48, 64)})
    return [{"layer": "proj", "rows": rows} | FIGURES for rows in (512, 4096)] + [
        {"layer": "linear1", "rows": 4608} | FIGURES
    ]


def test_a_forward_has_38_of_each_layer_half_of_them_for_the_text(found):
    found[0] = found[0] | {"both": {"torch": 3.0}}
    assert script.forward_ms(found, "both", "torch", 1024) == pytest.approx(19 * 3.0 + 19 * 1.0 + 38 * 1.0)
    assert script.forward_ms(found, "both", "Triton", 1024) is None


def test_the_fastest_setting_is_so_for_all_shapes_together(found):
    settings = [(1, 2), (3, 4), (5, 6)]
    for row, times in zip(found, ((0.1, 0.3), (1.0, 0.3), (0.1, 0.3)), strict=True):
        row["down"] = {"1/2": times[0], "3/4": times[1]}
    assert script.fastest(found, "down", settings, [1024]) == (3, 4)
    found[1]["down"]["1/2"] = 0.2
    assert script.fastest(found, "down", settings, [1024]) == (1, 2)
    del found[2]["down"]["1/2"], found[2]["down"]["3/4"]
    assert script.fastest(found, "down", settings, [1024]) is None


def test_the_bytes_are_those_of_input_output_and_factors():
    assert script.bytes_of(100, (30, 50), 16) == {"down": (100 * 50 + 16 * 50) * 2, "up": (2 * 100 * 30 + 16 * 30) * 2}


def test_the_last_lines_sum_a_forward_up(found):
    result = {"rows": found, "pixels": [1024], "copy_gbps": 3500.0, "best": {"down": "a", "up": "c"}}
    *_, last, host = script.table(result | {"host_us": {"torch": 11.0, "Triton": 35.0}}).splitlines()
    assert last == (
        "1024: a forward's LoRA takes 76.00 ms by torch (down + up alone: 30.40 + 38.00), 19.00 by Triton "
        "(7.60 + 15.20); to move the bytes at 3500 GB/s takes 3.80 + 9.50"
    )
    assert host == "the host: 11.0 us a layer by torch, 35.0 by Triton"


def test_without_triton_it_still_shows_its_help(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setitem(sys.modules, "low_rank_kernel", None)
    monkeypatch.setattr(sys, "argv", ["low_rank_kernels", "--help"])
    with pytest.raises(SystemExit):
        importlib.reload(script).main()
    assert "default: 16" in capsys.readouterr().out
