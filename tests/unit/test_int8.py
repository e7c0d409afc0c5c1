"""int8 as a way to multiply: its errors, who takes it, and what it does with LoRA."""

import logging
from types import SimpleNamespace

import comfy_kitchen
import pytest
import torch
from int8_on_cpu import int8_on_cpu
from interpreted_kernel import interpreted
from torch import nn

from flux_nf4.low_rank.branch import LowRank
from flux_nf4.low_rank.factors import Factors
from flux_nf4.nf4_loader.checkpoint.quant_state import DensePart, QuantState
from flux_nf4.nf4_loader.linear import int8, int8_weight, kitchen, measured
from flux_nf4.nf4_loader.linear.linear4bit import Linear4bit

SHAPE = (96, 1024)
ROWS = 128
CPU = torch.device("cpu")
DTYPE = torch.bfloat16
FASTER = "int8 where faster"


@pytest.fixture(params=[True, False], ids=["by kernel", "through a dense weight"])
def by_kernel(request):
    with int8_on_cpu(by_kernel=request.param):
        yield request.param


@pytest.fixture
def full():
    """The weight that was quantised."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(SHAPE[0] * 10_007 + SHAPE[1]))


@pytest.fixture
def layer_of(quantised_layer):
    """A function: a layer whose weight is `full`, quantised."""

    def make(quant_type="nf4", nested=False, dtype=DTYPE, compute=FASTER, shape=SHAPE):
        layer = quantised_layer(shape, quant_type, nested=nested, dtype=dtype)
        layer.bias.data.zero_()
        layer.compute_by(compute, CPU, dtype)
        return layer

    return make


def input_of(kind, dtype=DTYPE, rows=ROWS):
    generator = torch.Generator().manual_seed(1)
    plain = torch.randn(rows, SHAPE[1], generator=generator)
    channels = torch.randn(SHAPE[1], generator=generator)
    if kind == "outliers":
        plain = plain * torch.where(torch.arange(SHAPE[1]) % 100 == 7, 20.0, 1.0)
    if kind == "log-normal":
        plain = plain * channels.exp()
    return plain.to(dtype)


def exactly(layer, input):
    """What the layer computes without int8."""
    own, layer.int8 = layer.int8, None
    output = layer(input)
    layer.int8 = own
    return output


def error(found, expected):
    return float((found.float() - expected.float()).norm() / expected.float().norm())


# Errors


@pytest.mark.parametrize("kind", ["gaussian", "outliers", "log-normal"])
@pytest.mark.parametrize(("quant_type", "nested"), [("nf4", False), ("nf4", True), ("fp4", False)])
@pytest.mark.usefixtures("by_kernel")
def test_its_error_is_small_beside_that_of_4_bits(layer_of, full, quant_type, nested, kind):
    layer, input = layer_of(quant_type, nested), input_of(kind)
    found, exact, ideal = layer(input), exactly(layer, input), nn.functional.linear(input.float(), full)
    assert 0.005 < error(found, exact) < 0.016
    assert error(found, ideal) < 1.02 * error(exact, ideal)


def test_so_is_the_kernels_own(layer_of, full):
    """In fp16, for the interpreter."""
    with int8_on_cpu(), interpreted("int8_weight") as module, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_launch", _LAUNCH)
        layer, input = layer_of(dtype=torch.float16), input_of("outliers", torch.float16)
        assert 0.005 < error(layer(input), exactly(layer, input)) < 0.016


_LAUNCH = int8_weight._launch


@pytest.mark.parametrize("kind", ["outliers", "log-normal"])
def test_without_the_rotation_its_error_is_large(layer_of, monkeypatch, kind):
    eager = {
        name: comfy_kitchen.registry.get_implementation(name, backend="eager") for name in kitchen._Functions._fields
    }

    def plain_linear(*args, convrot, **options):
        return eager["int8_linear"](*args, **options)

    def plain_rows(weight, group):
        return comfy_kitchen.quantize_int8_rowwise(weight)

    with int8_on_cpu(by_kernel=False):
        monkeypatch.setattr(kitchen, "_functions", lambda device_type: kitchen._Functions(plain_linear, plain_rows))
        layer, input = layer_of(), input_of(kind)
        assert error(layer(input), exactly(layer, input)) > 0.025


def test_equal_inputs_give_equal_bits_wherever_the_weight_was(layer_of, by_kernel):
    layer, input = layer_of(), input_of("gaussian")
    first = layer(input)
    assert torch.equal(layer(input), first)
    layer.packed_0 = layer.packed_0.clone()
    assert torch.equal(layer(input), first)
    assert torch.equal(layer_of()(input), first)


# Who takes it


def is_int8(layer, input):
    return not torch.equal(layer(input), exactly(layer, input))


def test_it_has_to_be_asked_for(layer_of, by_kernel):
    input = input_of("gaussian")
    assert is_int8(layer_of(), input)
    for compute in (None, "exact"):
        layer = layer_of(compute=compute)
        assert layer.int8 is None
        assert not is_int8(layer, input)


def test_it_is_taken_only_where_it_is_faster(layer_of):
    with int8_on_cpu(is_faster=False):
        assert not is_int8(layer_of(), input_of("gaussian"))


def test_few_rows_are_exact_and_not_measured(layer_of, by_kernel):
    layer = layer_of()
    assert not is_int8(layer, input_of("gaussian", rows=63))
    assert not measured.timings
    assert is_int8(layer, input_of("gaussian", rows=64))


def test_input_of_another_dtype_is_exact(layer_of, by_kernel):
    assert not is_int8(layer_of(), input_of("gaussian", torch.float32))


def test_rows_of_no_whole_groups_are_exact(layer_of, by_kernel):
    layer = layer_of(shape=(32, 384))
    assert layer.int8 is None


def test_other_patches_are_exact(layer_of, by_kernel):
    layer = layer_of()
    layer.weight_function = [lambda weight: 2 * weight]
    input = input_of("gaussian")
    assert not is_int8(layer, input)
    assert error(layer(input), 2 * exactly(layer_of(), input)) < 1e-2


def test_what_it_keeps_on_the_device_is_told(layer_of, by_kernel):
    layer = layer_of()
    kept = layer.int8
    assert layer.compute_by(FASTER, CPU, DTYPE) == (4 * SHAPE[0] if by_kernel else 0)
    assert layer.int8 is kept
    layer.compute_by(FASTER, CPU, torch.float16)
    assert layer.int8 is not kept
    assert layer.compute_by(None, CPU, DTYPE) == 0
    assert layer.int8 is None


def test_parts_go_through_a_dense_weight(quantise):
    with int8_on_cpu():
        shapes = ((32, 1024), (48, 1024))
        (packed, state), (other, other_state) = quantise(shapes[0]), quantise(shapes[1], "fp4", 128)
        parts = [QuantState("nf4", 64, shapes[0]), QuantState("fp4", 128, shapes[1]), DensePart((16, 1024))]
        layer = Linear4bit(parts, bias=False, dtype=DTYPE)
        layer.packed_0.copy_(packed.view(-1))
        layer.absmax_0.copy_(state.absmax)
        layer.packed_1.copy_(other.view(-1))
        layer.absmax_1.copy_(other_state.absmax)
        layer.dense_2.copy_(torch.randn(16, 1024, generator=torch.Generator().manual_seed(3)))
        assert layer.compute_by(FASTER, CPU, DTYPE) == 0
        input = input_of("outliers")
        assert 0.005 < error(layer(input), exactly(layer, input)) < 0.016


# LoRA


def lora(rank, scale=1.0, rows=SHAPE[0], start=0):
    generator = torch.Generator().manual_seed(rank)
    up, down = torch.randn(rows, rank, generator=generator), 0.2 * torch.randn(rank, SHAPE[1], generator=generator)
    return Factors(up, down, scale, start)


def patch(layer, *factors):
    """Give ``layer`` these LoRAs, as `Patching` does, through a patch of ComfyUI's that is made of them."""

    class Adapter:
        name = "lora"

        def __init__(self, factor):
            self.weights = (factor.up, factor.down, None, None, None, None)

    patches = [(f.scale, Adapter(f), 1.0, (0, f.start, f.up.shape[0]), None) for f in factors]
    tensors = layer.take_patches(patches, layer.dtype)
    for name, tensor in tensors.items():
        layer.register_buffer(name, tensor, persistent=False)


@pytest.mark.parametrize(
    "factors",
    [
        [lora(4)],
        [lora(4), lora(12, 0.5)],
        [lora(8, rows=32), lora(4, rows=64, start=32)],
        [lora(16), lora(16)],
        [lora(4, rows=32, start=16)],
    ],
    ids=["one", "two", "of parts of the rows", "many ranks", "of some rows"],
)
def test_lora_is_in_it(layer_of, by_kernel, factors):
    layer, input = layer_of(), input_of("outliers")
    patch(layer, *factors)
    exact = exactly(layer, input)
    assert 0.004 < error(layer(input), exact) < 0.016
    assert error(exact, exactly(layer_of(), input)) > 0.1


def test_lora_of_few_ranks_is_in_the_weight_and_costs_no_product(layer_of, monkeypatch):
    def no_product(*_):
        raise AssertionError("a product beside the matmul")

    monkeypatch.setattr(LowRank, "add_to", no_product)
    monkeypatch.setattr(LowRank, "product", no_product)
    with int8_on_cpu():
        layer = layer_of()
        patch(layer, lora(16))
        layer(input_of("gaussian"))
        patch(layer, lora(17))
        with pytest.raises(AssertionError, match="product"):
            layer(input_of("gaussian"))


def test_a_strength_that_changes_changes_the_scales(layer_of, by_kernel):
    layer, input = layer_of(), input_of("gaussian")
    factor = lora(8)
    plain = layer(input)
    seen = []
    for strength in (1.0, 0.25, 1.0):
        patch(layer, Factors(factor.up, factor.down, strength, 0))
        seen.append(layer(input))
        fresh = layer_of()
        patch(fresh, Factors(factor.up, factor.down, strength, 0))
        assert torch.equal(seen[-1], fresh(input))
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])
    layer.take_patches((), DTYPE)
    assert torch.equal(layer(input), plain)


@pytest.fixture
def launches():
    """Whether each launch was told that the scales are known."""
    told = []
    with int8_on_cpu(), pytest.MonkeyPatch.context() as patch:
        launch = int8_weight._launch
        patch.setattr(int8_weight, "_launch", lambda *args: (told.append(args[-1]), launch(*args))[1])
        yield told


def test_scales_are_computed_once_and_again_when_a_strength_has_changed(layer_of, launches):
    layer, factor, input = layer_of(), lora(8), input_of("gaussian")
    for scale in (1.0, 1.0, 0.5, 0.5):
        patch(layer, Factors(factor.up, factor.down, scale, 0))
        for _ in range(2):
            layer(input)
    assert launches == [False, *3 * [True], False, *3 * [True]]
    layer.compute_by(None, CPU, DTYPE)
    layer.compute_by(FASTER, CPU, DTYPE)
    layer(input)
    assert launches[-1] is False


def test_what_is_captured_computes_them_itself(layer_of, launches, monkeypatch):
    """A CUDA graph runs later: when it is captured nothing is computed, and when it runs the LoRA may be another."""
    layer, input = layer_of(), input_of("gaussian")
    with monkeypatch.context() as capturing:
        capturing.setattr(int8, "is_captured", lambda device: True)
        layer(input)
        layer(input)
    layer(input)
    layer(input)
    with monkeypatch.context() as capturing:
        capturing.setattr(int8, "is_captured", lambda device: True)
        layer(input)
    assert launches == [False, False, False, True, False]


# torch.compile


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("rank", [None, 8, 24])
@pytest.mark.usefixtures("fresh_compiler")
def test_layers_of_a_kind_are_compiled_once_and_whole(layer_of, by_kernel, rank):
    layers, input = [layer_of() for _ in range(3)], input_of("gaussian")
    compiled = torch.compile(lambda layer, input: layer(input), backend="aot_eager", fullgraph=True)
    stance = "default"
    for layer in layers:
        if rank:
            patch(layer, lora(rank))
        with torch.inference_mode():
            expected = layer(input)
            assert is_int8(layer, input)
            with torch.compiler.set_stance(stance):
                torch.testing.assert_close(compiled(layer, input), expected, rtol=1e-2, atol=1e-2)
                if not rank:
                    assert torch.equal(compiled(layer, input), expected)
        stance = "fail_on_recompile"


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_computes_scales_that_were_forgotten_without_compiling_anew(layer_of, launches, monkeypatch):
    def is_captured(device):
        torch._dynamo.graph_break()  # the compiler need not know how to ask a GPU
        return False

    monkeypatch.setattr(int8, "is_captured", is_captured)
    layer, input = layer_of(), input_of("gaussian")
    compiled = torch.compile(lambda input: layer(input), backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        compiled(input)
        expected = layer.int8.row_scale.clone()
        assert expected.all()
        with torch.compiler.set_stance("fail_on_recompile"):
            compiled(input)
            layer(input)
            int8.forget_scales(layer)
            compiled(input)
    assert torch.equal(layer.int8.row_scale, expected)


# Where it cannot be used


@pytest.fixture
def untried():
    for cached in (kitchen.works_on, kitchen._functions):
        cached.cache_clear()
    yield
    for cached in (kitchen.works_on, kitchen._functions):
        cached.cache_clear()


GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """An NVIDIA GPU on which all is well; a test breaks one thing."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old Card")
    monkeypatch.setattr(kitchen, "trial", lambda device, dtype: None)
    assert kitchen.problem_on(GPU, DTYPE) is None
    return monkeypatch


def raises(error):
    def raising(*_):
        raise error

    return raising


@pytest.mark.parametrize(
    ("owner", "name", "value", "said"),
    [
        (torch.version, "cuda", "12.8", "this PyTorch is built for CUDA 12.8, and comfy-kitchen needs 13"),
        (torch.version, "hip", "6.4", "it needs an NVIDIA GPU, and the model computes on AMD"),
        (torch.cuda, "get_device_capability", lambda device: (7, 0), "Old Card has no int8 tensor cores"),
        (kitchen, "trial", raises(ImportError("no module")), "comfy-kitchen cannot be imported (no module)"),
        (kitchen, "trial", raises(RuntimeError("boom")), "int8 fails here (RuntimeError: boom)"),
        (kitchen, "trial", lambda *_: "it gives other values", "it gives other values"),
    ],
    ids=["old CUDA", "AMD", "old GPU", "no kitchen", "broken", "wrong"],
)
@pytest.mark.usefixtures("untried")
def test_it_is_said_once_why_it_is_not_used(gpu, caplog, layer_of, owner, name, value, said):
    layer = layer_of(compute=None)
    gpu.setattr(owner, name, value)
    for _ in range(2):
        assert layer.compute_by(FASTER, GPU, DTYPE) == 0
        assert layer.int8 is None
    (line,) = caplog.messages
    assert line.startswith("NF4: int8 cannot be used here (")
    assert said in line
    assert line.endswith("), so everything is computed exactly")


@pytest.mark.parametrize(("device", "dtype"), [(CPU, DTYPE), (GPU, torch.float32)])
@pytest.mark.usefixtures("untried", "gpu")
def test_the_cpu_and_fp32_are_exact(device, dtype):
    assert kitchen.problem_on(device, dtype) is not None


@pytest.mark.usefixtures("untried")
def test_a_lack_of_memory_is_no_answer(gpu):
    gpu.setattr(kitchen, "trial", raises(torch.OutOfMemoryError("CUDA out of memory.")))
    with pytest.raises(torch.OutOfMemoryError):
        kitchen.works_on(GPU, DTYPE)
    gpu.setattr(kitchen, "trial", lambda *_: None)
    assert kitchen.works_on(GPU, DTYPE)


def test_the_trial_notices_other_values(monkeypatch):
    assert kitchen.trial(CPU, DTYPE) is None
    right = kitchen.quantise
    monkeypatch.setattr(kitchen, "quantise", lambda weight: (right(weight)[0], 1.1 * right(weight)[1]))
    assert "other values" in kitchen.trial(CPU, DTYPE)


def test_tensors_are_exported_to_comfy_kitchen_without_checks():
    from comfy_kitchen.backends import cuda

    fast, x = kitchen._with_fast_export(exporting), torch.ones(3)
    assert torch.equal(fast(x), 2 * x)
    assert torch.equal(fast(x, scale=3.0), 3 * x)
    assert kitchen._with_fast_export(torch.add) is torch.add
    assert kitchen._with_fast_export(interpreted) is interpreted  # of a module that exports nothing
    assert kitchen._EXPORT in vars(cuda)  # if comfy-kitchen has renamed it, all works, and takes the host longer
    assert kitchen._with_fast_export(cuda.int8_linear) is not cuda.int8_linear


def exporting(x, *, scale=2.0):
    """Exports a tensor as comfy-kitchen's functions do."""
    return torch.from_dlpack(_wrap_for_dlpack(x)) * scale


def _wrap_for_dlpack(tensor):
    raise AssertionError("exported with checks")


def test_a_model_that_is_exact_logs_nothing(layer_of, caplog):
    with caplog.at_level(logging.INFO):
        layer_of(compute=None)(input_of("gaussian"))
    assert not caplog.messages


# Measuring


def case(rows=4096, device=GPU):
    return measured.Case((64, 256), rows, DTYPE, device, True)


@pytest.fixture
def measuring(monkeypatch):
    """Counts what is measured; int8 is faster on the first GPU only."""
    monkeypatch.setattr(measured, "timings", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    seen = []

    def measure(asked):
        seen.append(asked)
        return measured.Timing(2.0, 1.0 if asked.device == GPU else 3.0)

    monkeypatch.setattr(measured, "measure", measure)
    return seen


def test_each_case_is_measured_once_by_device_and_rows(measuring):
    other = torch.device("cuda", 1)
    for _ in range(2):
        assert measured.int8_is_faster(*case())
        assert measured.int8_is_faster(*case(512))
        assert not measured.int8_is_faster(*case(device=other))
    assert measuring == [case(), case(512), case(device=other)]


def test_what_was_interrupted_is_measured_again(measuring, monkeypatch):
    class Interrupt(BaseException):
        pass

    with monkeypatch.context() as patch:
        patch.setattr(measured, "measure", raises(Interrupt()))
        with pytest.raises(Interrupt):
            measured.int8_is_faster(*case())
    assert measured.int8_is_faster(*case())


def test_nothing_is_measured_while_a_graph_is_captured(measuring, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not measured.int8_is_faster(*case())
    assert not measuring
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert measured.int8_is_faster(*case())


@pytest.mark.parametrize(
    ("exact_ms", "int8_ms", "is_faster"), [(1.0, 1.0, False), (1.04, 1.0, False), (1.06, 1.0, True)]
)
def test_a_little_faster_is_not_enough(exact_ms, int8_ms, is_faster):
    assert measured.Timing(exact_ms, int8_ms).int8_is_faster is is_faster


def test_where_the_host_is_the_limit_it_is_exact():
    """However much less the device would have to do."""
    assert measured.Timing(2.0, 1.0, 0.5).int8_is_faster
    assert not measured.Timing(2.0, 1.0, 0.51).int8_is_faster


@pytest.mark.parametrize("by_kernel", [True, False])
def test_both_ways_are_timed_in_turns_after_a_first_call(monkeypatch, by_kernel):
    whole = measured.measure
    with int8_on_cpu(by_kernel=by_kernel), monkeypatch.context() as patch:
        ran = []
        noise = iter([1, 1, 1.5, 1, 1, 3, 1, 1, 1.2, 1, 1, 1])

        def elapsed_ms(call, device, count=1):
            ran.append((call.__name__, count))
            assert call().shape == (128, 64)
            times = next(noise)
            return {"exact": 3.0, "int8": 1.0}[call.__name__] * times, 0.2 * times

        patch.setattr(measured, "elapsed_ms", elapsed_ms)
        state = torch.get_rng_state()
        timing = whole(measured.Case((64, 256), 128, DTYPE, CPU, by_kernel))
    assert timing == (3.0, 1.0, 0.2)  # the shortest of exact, the medians of int8
    assert ran == [("exact", 1), ("int8", 1), *5 * [("exact", 1), ("int8", 5)]]
    assert torch.equal(torch.get_rng_state(), state)


def test_the_host_is_timed_until_it_has_launched(monkeypatch):
    clock_ms = 0

    def wait(ms):
        nonlocal clock_ms
        clock_ms += ms

    class Event:
        """The device needs 3 ms a call."""

        def record(self):
            self.calls = len(calls)

        def synchronize(self):
            wait(200)  # this does not count as the host's

        def elapsed_time(self, ended):
            return 3.0 * (ended.calls - self.calls)

    calls = []

    def call():
        calls.append(1)
        wait(10)

    device = SimpleNamespace(Event=lambda enable_timing: Event())
    monkeypatch.setattr(torch, "get_device_module", lambda kind: device)
    monkeypatch.setattr(measured, "time", SimpleNamespace(perf_counter=lambda: clock_ms / 1000))
    assert measured.elapsed_ms(call, GPU, 4) == (3.0, 10.0)


def test_the_names_of_the_ways_are_those_that_are_asked_for():
    assert FASTER in int8.Compute.__args__
