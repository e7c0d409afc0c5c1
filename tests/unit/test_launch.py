"""Triton kernels are launched by what Triton has compiled, without it looking at each argument."""

from types import SimpleNamespace

import pytest
import torch

from flux_nf4.with_triton.launch import launch

GRID, NUMBERS, DTYPE = (3, 2, 1), (16, 0, 12), torch.bfloat16


class Kernel:
    """Counts its launches through Triton, and those of the kernel that this compiles."""

    def __init__(self, error=None):
        self.through_triton, self.compiled, self.error = [], [], error

    def __getitem__(self, grid):
        def launched(*args, num_warps):
            self.warps = num_warps
            self.through_triton.append((grid, *args))
            return Compiled(self)

        return launched

    def launch(self, tensors, grid=GRID, numbers=NUMBERS, dtype=DTYPE, num_warps=4):
        launch(self, grid, tensors, numbers, dtype, num_warps=num_warps)


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launched(*args):
            if self.kernel.error is not None:
                raise self.kernel.error
            self.kernel.compiled.append((grid, *args))

        return launched


@pytest.fixture
def tensors(monkeypatch):
    monkeypatch.setattr("flux_nf4.with_triton.launch._compiled", {})
    return [torch.zeros(64) for _ in range(4)]


def test_a_compiled_kernel_is_launched_without_triton_looking_at_it_again(tensors):
    kernel = Kernel()
    for _ in range(3):
        kernel.launch(tensors)
    addresses = [tensor.data_ptr() for tensor in tensors]
    assert kernel.through_triton == [(GRID, *tensors, *NUMBERS)]
    assert kernel.compiled == 2 * [(GRID, *addresses, *NUMBERS)]


def test_it_is_compiled_for_these_numbers_this_dtype_this_grid_and_these_options(tensors):
    """Triton compiles for numbers, too: for those that sixteen divides, and for constants."""
    kernel = Kernel()
    others = {"numbers": (17, 0, 12), "dtype": torch.float16, "grid": (9, 9, 1), "num_warps": 8}
    for name, other in others.items():
        kernel.launch(tensors)
        kernel.launch(tensors, **{name: other})
    assert kernel.warps == 8
    assert len(kernel.through_triton) == 1 + len(others)
    assert len(kernel.compiled) == len(others) - 1


def test_tensors_that_begin_elsewhere_are_launched_by_triton(tensors):
    """It compiles another kernel for them: this one loads 16 bytes at once."""
    kernel = Kernel()
    for index in range(4):
        odd = [*tensors]
        odd[index] = odd[index][1:]
        kernel.launch(odd)
    kernel.launch(tensors)
    kernel.launch(odd)
    assert (len(kernel.through_triton), len(kernel.compiled)) == (6, 0)


def test_a_triton_that_calls_compiled_kernels_otherwise_launches_all(tensors):
    kernel = Kernel(TypeError("function takes exactly 12 arguments"))
    for _ in range(3):
        kernel.launch(tensors)
    assert len(kernel.through_triton) == 3
    kernel = Kernel(RuntimeError("out of resources"))
    kernel.launch(tensors)
    with pytest.raises(RuntimeError, match="resources"):
        kernel.launch(tensors)


def test_triton_takes_what_a_compiled_kernel_is_called_with(tensors, tmp_path, monkeypatch):
    """Up to the launcher that it compiles, which needs a driver."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compiler

    from flux_nf4.nf4_loader.linear.expanded_weight_kernel import kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    names = kernel.arg_names
    signature = {"packed": "*u8", "out": "*bf16", "words": "i32"}
    signature = {name: signature.get(name, "constexpr" if name.isupper() else "*fp32") for name in names}
    constants = {"BLOCK_WORDS": 8, "IS_NESTED": 0, "NESTED_BLOCK": 256, "WORDS": 256}
    made = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 86, 32))
    launched = []
    device = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 7)
    monkeypatch.setattr(compiler, "driver", SimpleNamespace(active=device))
    made.module, made._run = object(), lambda *args: launched.append(args)

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, num_warps: made

    tensors += 3 * tensors[:1]
    kernel, numbers = Kernel(), (512, *constants.values())
    for _ in range(2):
        launch(kernel, GRID, tensors, numbers, DTYPE, num_warps=4)
    assert launched[0][:4] == (*GRID, 7)
    assert launched[0][9:] == (*(tensor.data_ptr() for tensor in tensors), *numbers)
    assert len(launched[0][9:]) == len(names)
