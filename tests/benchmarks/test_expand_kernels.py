"""What `benchmarks/expand_kernels.py` tries: a kernel that expands NF4 weights, and what its tables say."""

import importlib
from itertools import cycle

import expand_kernels
import pytest
import torch
from expand_kernels import BNB, COPY, FILL, SETTINGS, Pair, Row, Setting

from flux_nf4.nf4_loader.checkpoint.quant_state import QuantState
from flux_nf4.nf4_loader.linear import kernels

LOOKUPS = sorted({setting.lookup for setting in SETTINGS})


@pytest.fixture
def interpreted(monkeypatch):
    """The kernel, by Triton's interpreter."""
    pytest.importorskip("triton")
    name = "expand_kernel"
    with monkeypatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        importlib.reload(importlib.import_module(name))
    yield
    importlib.reload(importlib.import_module(name))


def weight(blocks):
    """All pairs of codes, and one factor for each block of 64."""
    packed = torch.arange(32 * blocks).to(torch.uint8)
    absmax = torch.rand(blocks, generator=torch.Generator().manual_seed(0)) + 0.01
    return packed, absmax, QuantState("nf4", 64, (blocks, 64))


@pytest.mark.parametrize("blocks", [1, 16, 37], ids=["a part of a program", "a whole one", "more than two"])
@pytest.mark.parametrize("lookup", LOOKUPS)
def test_values_are_those_of_bitsandbytes_to_the_bit(interpreted, lookup, blocks):
    """In fp32 nothing is rounded, in fp16 once. To bf16 the interpreter cuts off: compiled code is looked at below."""
    packed, absmax, state = weight(blocks)
    for dtype, bits in ((torch.float32, torch.int32), (torch.float16, torch.int16)):
        found = expand_kernels.expand(packed, absmax, state, dtype, Setting(lookup, 512, 4))
        assert found.shape == state.shape
        for expand in (kernels.dequantise, kernels.dequantise_by_table):
            assert torch.equal(found.view(bits), expand(packed, absmax, state, dtype).view(bits))


@pytest.mark.parametrize("lookup", LOOKUPS)
def test_nothing_is_written_beside_the_weight(interpreted, lookup):
    packed, absmax, state = weight(17)
    buffer = torch.full((17 * 64 + 4096,), 9.0)
    code = kernels.code_table("nf4", packed.device)
    expand_kernels.launched(packed, absmax, code, buffer, Setting(lookup, 512, 4))
    assert torch.equal(buffer[: 17 * 64].view(state.shape), kernels.dequantise_by_table(*weight(17), torch.float32))
    assert (buffer[17 * 64 :] == 9).all()


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 120])
def test_it_compiles_for_gpus_of(capability, setting, tmp_path, monkeypatch):
    """And as it is meant to: stores are 16 bytes wide, threads exchange nothing, values are rounded to the nearest."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = importlib.import_module("expand_kernel").kernel
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sizes = {"LOOKUP": setting.lookup, "WORDS": setting.nbytes // 4}
    dtype = "fp16" if capability == 75 else "bf16"
    signature = {"packed": "*u8", "absmax": "*fp32", "code": "*fp32", "out": f"*{dtype}", "words": "i32"}
    aligned = {(index,): [["tt.divisibility", 16]] for index in range(len(signature))}
    source = ASTSource(kernel, signature | dict.fromkeys(sizes, "constexpr"), sizes, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": setting.warps})
    stores = [line for line in made.asm["ptx"].splitlines() if "st.global" in line]
    words_of_a_thread = setting.nbytes // 4 // (32 * setting.warps)
    assert len(stores) == words_of_a_thread
    assert all("st.global.v4" in store for store in stores)
    assert made.metadata.shared == (64 if setting.lookup == "gather" else 0)  # the table
    assert "cvt.rn." in made.asm["ptx"]
    assert "cubin" in made.asm


def test_a_compiled_kernel_called_directly_is_given_what_its_signature_says(monkeypatch):
    launches = []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *arguments: launches.append((grid, arguments))

    monkeypatch.setattr(expand_kernels, "launched", lambda *_: Compiled())
    packed, absmax, state = weight(40)
    found = expand_kernels.by_compiled_kernel(cycle([(packed, absmax, state)]), Setting("tree", 1024, 4))()
    code = kernels.code_table("nf4", packed.device)
    addresses = [tensor.data_ptr() for tensor in (packed, absmax, code, found)]
    assert launches == [((2, 1, 1), (*addresses, 320, "tree", 256))]
    names = importlib.import_module("expand_kernel").kernel.arg_names
    assert names == ["packed", "absmax", "code", "out", "words", "LOOKUP", "WORDS"]


def test_a_setting_that_fails_or_gives_other_bits_is_told_and_left_out(monkeypatch):
    def broken(packed, absmax, state, dtype, setting):
        if setting == SETTINGS[0]:
            raise RuntimeError("out of resources")
        return kernels.dequantise(packed, absmax, state, dtype) + (setting == SETTINGS[1])

    monkeypatch.setattr(expand_kernels, "SHAPES", {"proj": (8, 64), "qkv": (24, 64)})
    monkeypatch.setattr(expand_kernels, "cold", lambda shape: cycle([weight(shape[0])]))
    monkeypatch.setattr(expand_kernels, "plain_ways", lambda nbytes: dict.fromkeys((COPY, FILL)))
    monkeypatch.setattr(expand_kernels, "expand", broken)
    monkeypatch.setattr(expand_kernels, "device_ms", lambda call, *_: 0.001)
    found, problems = expand_kernels.measure(1)
    assert problems == {
        SETTINGS[0].name: "RuntimeError: out of resources",
        SETTINGS[1].name: "other bits than bitsandbytes",
    }
    ways = {BNB, COPY, FILL, *(setting.name for setting in SETTINGS[2:])}
    assert [(row.layer, row.way) for row in found[:3]] == [("proj", BNB), ("proj", COPY), ("proj", FILL)]
    assert {(row.layer, row.way) for row in found} == {(name, way) for name in ("proj", "qkv") for way in ways}
    moved = {"proj": 8 * (32 + 4 + 128), "qkv": 24 * (32 + 4 + 128)}
    assert all(row.gbps == pytest.approx(moved[row.layer] / 1000) for row in found)
    assert f"{SETTINGS[0].name}: RuntimeError: out of resources" in expand_kernels.table(found, problems).splitlines()


@pytest.fixture
def _two_layers(monkeypatch):
    monkeypatch.setattr(expand_kernels, "SHAPES", {"qkv": (), "linear1": ()})
    monkeypatch.setattr(expand_kernels, "SETTINGS", SETTINGS[:2])


@pytest.mark.usefixtures("_two_layers")
def test_the_best_setting_is_that_of_a_whole_forward():
    """Not the one that is the fastest for a layer."""
    first, second = (setting.name for setting in SETTINGS[:2])
    ms = {BNB: (0.5, 0.5), COPY: (0.125, 0.125), FILL: (0.1, 0.1), first: (0.1, 0.4), second: (0.2, 0.25)}
    found = [
        Row(name, way, own[index], 1000.0) for index, name in enumerate(("qkv", "linear1")) for way, own in ms.items()
    ]
    assert expand_kernels.forward_ms(found, second) == pytest.approx(38 * 0.45)
    *lines, last = expand_kernels.table(found, {}).splitlines()
    assert last == (
        f"{second}: a forward would take 20.90 ms less, of 38.00 ms that bitsandbytes takes to expand; at the speed of "
        "a copy it would take 28.50 ms less"
    )
    assert f"| {first} | 0.1000 (1000) | 0.4000 (1000) | 19.00 |" in lines
    problems = dict.fromkeys((first, second), "other bits than bitsandbytes")
    assert expand_kernels.best(found, problems) is None
    assert expand_kernels.table(found, problems).endswith("no setting can be used here")


def test_pairs_are_summed_as_often_as_a_forward_has_them():
    """38 single blocks; 19 double ones, which have each Linear twice, for the text and for the picture."""
    pairs = [
        Pair(1024, "qkv", 512, 2.0, 1.0),
        Pair(1024, "qkv", 4096, 4.0, 3.5),
        Pair(1024, "linear1", 4608, 5.0, 4.75),
        Pair(512, "linear1", 1536, 2.0, 2.5),
    ]
    lines = expand_kernels.table_of_pairs(pairs).splitlines()
    assert "| 1024 | qkv | 512 | 2.0000 | 1.0000 | 0.500 |" in lines
    assert lines[-2:] == [
        "1024: all Linears of a forward would take 38.00 ms less, 12.5 % of 304.0 ms",
        "512: all Linears of a forward would take -19.00 ms less, -25.0 % of 76.0 ms",
    ]
