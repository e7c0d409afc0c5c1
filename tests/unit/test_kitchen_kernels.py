"""comfy-kitchen's compiled functions, called directly: as its own code calls them, or not at all.

The compiled functions are stand-ins on the CPU with the arguments that those of 0.2.31 and 0.2.40 take.
"""

from types import SimpleNamespace

import comfy_kitchen
import pytest
import torch
from comfy_kitchen.backends import cuda

from flux_nf4.nf4_loader.linear import kitchen_kernels

CPU, DTYPE = torch.device("cpu"), torch.bfloat16
COLUMNS, OUT = 768, 48
EAGER = comfy_kitchen.registry.get_implementation("int8_linear", backend="eager")
STREAM = 7


def theirs(input, rows, row_scale, bias):
    return EAGER(input, rows, row_scale, bias, out_dtype=input.dtype, convrot=True, convrot_groupsize=256)


class Compiled:
    """Both functions. ``version`` says which arguments they take and in which dtype they read a bias."""

    def __init__(self, version, multiplies=True):
        self.version, self.multiplies, self.calls = version, multiplies, []

    def quantize_int8_rowwise_convrot64(self, x, codes, scale, group, stochastic, act, seed, *more):
        if self.version != "0.2.31":
            weight, epsilon, stream = more
            assert torch.from_dlpack(weight).numel() == epsilon == 0
        else:
            (stream,) = more
        if not isinstance(stream, int):
            raise TypeError("incompatible function arguments")
        assert (group, stochastic, act, seed, stream) == (256, False, 0, 0, STREAM)
        self.x = torch.from_dlpack(x)
        assert self.x.is_contiguous()
        assert torch.from_dlpack(codes).shape == self.x.shape
        assert torch.from_dlpack(scale).shape == (len(self.x), 1)

    def cutlass_int8_dequant(self, codes, rows, scale, row_scale, bias, output, code, stream):
        if not self.multiplies:
            return False
        bias, output = torch.from_dlpack(bias), torch.from_dlpack(output)
        assert bias.dtype == (torch.float32 if self.version == "0.2.31" else DTYPE)
        assert (code, stream) == (2, STREAM)
        bias = bias.to(DTYPE) if bias.numel() else None
        output.copy_(theirs(self.x, torch.from_dlpack(rows), torch.from_dlpack(row_scale), bias))
        self.calls.append(output.shape)
        return True


def module(compiled, *, fits=True):
    return SimpleNamespace(
        _C=compiled,
        _CONVROT_FUSED_MAX_K=1024,
        _convrot_fused_shared_memory_fits=lambda x, columns, group: fits or columns == 512,
    )


@pytest.fixture(autouse=True)
def capability(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=STREAM))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability.value)
    capability.value = (8, 6)
    return capability


def arguments(count=24, columns=COLUMNS, is_strided=False):
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(2, count // 2, 2 * columns if is_strided else columns, generator=generator).to(DTYPE)
    rows = torch.randint(-127, 128, (OUT, columns), generator=generator).to(torch.int8)
    bias = torch.randn(OUT, generator=generator).to(DTYPE)
    return input[..., :columns], rows, torch.rand(OUT, generator=generator), bias


def run(compiled, given, **of_module):
    linear = kitchen_kernels.faster(theirs, module(compiled, **of_module), CPU, DTYPE)
    compiled.calls.clear()
    assert torch.equal(linear(*given), theirs(*given))
    return linear


@pytest.mark.parametrize("version", ["0.2.31", "0.2.40"])
@pytest.mark.parametrize("is_strided", [False, True])
def test_each_version_is_called_as_its_own_code_calls_it(version, is_strided):
    compiled, given = Compiled(version), arguments(is_strided=is_strided)
    linear = run(compiled, given)
    assert compiled.calls == [(24, OUT)]
    without_bias = (*given[:3], None)
    assert torch.equal(linear(*without_bias), theirs(*without_bias))
    flat = (given[0].reshape(24, COLUMNS), *given[1:])
    assert torch.equal(linear(*flat), theirs(*flat))
    assert len(compiled.calls) == 3


class Other(Compiled):
    def quantize_int8_rowwise_convrot64(self, *args, more):
        raise AssertionError("it cannot be called")


def wrong_bits():
    compiled = Compiled("0.2.40")
    right = compiled.cutlass_int8_dequant

    def off(codes, rows, scale, row_scale, bias, output, code, stream):
        values = torch.from_dlpack(output)
        right(codes, rows, scale, row_scale, bias, torch.utils.dlpack.to_dlpack(values), code, stream)
        values[0, 0] *= 1.5
        return True

    compiled.cutlass_int8_dequant = off
    return module(compiled)


@pytest.mark.parametrize(
    "there",
    [
        lambda: module(Other("0.2.40")),
        lambda: SimpleNamespace(_C=Compiled("0.2.40")),
        lambda: SimpleNamespace(),
        wrong_bits,
    ],
    ids=["other arguments", "other names", "no compiled code", "other bits"],
)
def test_what_is_not_known_or_gives_other_bits_is_left_to_comfy_kitchen(there):
    assert kitchen_kernels.faster(theirs, there(), CPU, DTYPE) is theirs


def test_older_gpus_have_other_kernels(capability):
    capability.value = (7, 5)
    assert kitchen_kernels.faster(theirs, module(Compiled("0.2.40")), CPU, DTYPE) is theirs


def test_a_lack_of_memory_is_no_answer():
    def multiply(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    compiled = Compiled("0.2.40")
    compiled.cutlass_int8_dequant = multiply
    with pytest.raises(torch.OutOfMemoryError):
        kitchen_kernels.faster(theirs, module(compiled), CPU, DTYPE)


@pytest.mark.parametrize("case", ["few rows", "too many columns", "no room in shared memory", "unaligned bias"])
def test_what_its_code_computes_otherwise_is_left_to_it(case):
    compiled, given, fits = Compiled("0.2.40"), arguments(), True
    if case == "few rows":
        given = arguments(count=2)
    if case == "too many columns":
        given = arguments(columns=1280)
    if case == "no room in shared memory":
        fits = False
    if case == "unaligned bias":
        given = (*given[:3], torch.cat((given[3][:1], given[3]))[1:])
    run(compiled, given, fits=fits)
    assert compiled.calls == []


def test_a_matmul_that_is_refused_is_left_to_comfy_kitchen():
    compiled = Compiled("0.2.40")
    linear = kitchen_kernels.faster(theirs, module(compiled), CPU, DTYPE)
    compiled.multiplies, given = False, arguments()
    assert torch.equal(linear(*given), theirs(*given))


def test_this_comfy_kitchen_has_what_is_called():
    """If it has not, all works, and takes the host longer."""
    assert {"_C", "_CONVROT_FUSED_MAX_K", "_convrot_fused_shared_memory_fits"} <= set(vars(cuda))
    for function in ("quantize_int8_rowwise_convrot64", "cutlass_int8_dequant"):
        with pytest.raises(TypeError, match="incompatible"):
            getattr(cuda._C, function)()
    assert kitchen_kernels.CODES.items() <= cuda.DTYPE_TO_CODE.items()
