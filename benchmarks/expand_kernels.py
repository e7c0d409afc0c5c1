"""Whether a Triton kernel expands NF4 weights to bf16 faster than bitsandbytes does, with the same bits.

    COMFYUI_PATH=~/ComfyUI python benchmarks/expand_kernels.py --output results

A trial: the package uses bitsandbytes. For each shape of Flux's Linears it prints the time of bitsandbytes and of the
kernel in several settings, and GB/s of the bytes that they read and write, beside a copy and a fill on the device that
move as many bytes; what a forward would take less with the setting that is the best for all shapes; then the same for
expanding and the matmul after it, with the rows that pictures have; and the host's time of a launch. Weights lie at
other addresses in each call, as in a forward, so that none is read from the cache. A setting that cannot be compiled or
gives other bits is told and left out. Run it with ComfyUI's Python. It also writes ``expand_kernels.json``.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import needs_torch  # noqa: F401
import orderly
import torch
from about import about
from arguments import begin, parser_for, positive
from inside_comfyui import import_package, use_allocator_of_comfyui
from int8_layers import OF_EACH, SHAPES, Packed, device_ms, host_us, layer_of, rows_of_pictures

DTYPE = torch.bfloat16
BNB, COPY, FILL = "bitsandbytes", "copy", "fill"

TURNS = 3
"""The least of so many medians counts: what else goes on only adds to it."""

_AHEAD_CYCLES = 20_000_000
"""About a hundredth of a second, in which the host enqueues what is timed."""


class Setting(NamedTuple):
    """How the kernel finds values, packed bytes of a program, and its warps."""

    lookup: str
    nbytes: int
    warps: int

    @property
    def name(self) -> str:
        return f"{self.lookup}, {self.nbytes} bytes, {self.warps} warps"


SETTINGS = (
    *(Setting("gather", *sizes) for sizes in ((512, 4), (1024, 4), (2048, 4), (4096, 4), (4096, 8))),
    *(Setting("load", *sizes) for sizes in ((512, 4), (1024, 4), (2048, 4), (4096, 8))),
    *(Setting("tree", *sizes) for sizes in ((1024, 4), (2048, 4), (4096, 8))),
)
"""A thread expands 8 values of each 128 bytes that its warp has: 8 to 64."""

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Row:
    """``way`` is BNB, COPY, FILL or the name of a setting; ``gbps`` are 1e9 bytes a second, read and written."""

    layer: str
    way: str
    ms: float
    gbps: float


@dataclass(frozen=True)
class Pair:
    """Expanding and the matmul with ``rows`` rows of input: of a picture with so many pixels a side."""

    pixels: int
    layer: str
    rows: int
    bitsandbytes_ms: float
    kernel_ms: float


def measure(repeats: int) -> tuple[list[Row], dict[str, str]]:
    """Each shape in each way; and what is wrong with settings, by name, which are left out from there on."""
    found, problems = [], dict[str, str]()
    for name, shape in SHAPES.items():
        weights = cold(shape)
        packed, absmax, _ = next(weights)
        dense_bytes = 2 * shape[0] * shape[1]
        moved = packed.nbytes + absmax.nbytes + dense_bytes
        ways = {BNB: by_bitsandbytes(weights)} | plain_ways(moved)
        expected = ways[BNB]()
        for setting in SETTINGS:
            if setting.name in problems:
                continue
            ways[setting.name] = by_kernel(weights, setting)
            if problem := problem_of(ways[setting.name], expected):
                problems[setting.name] = problem
                del ways[setting.name]
        del expected
        times = best_of_turns(ways, repeats)
        found += [Row(name, way, ms, moved / ms / 1e6) for way, ms in times.items()]
    return [row for row in found if row.way not in problems], problems


def problem_of(call: Call, expected: torch.Tensor) -> str | None:
    """Why what ``call`` expands to cannot be used, or None."""
    try:
        return None if torch.equal(call(), expected) else "other bits than bitsandbytes"
    except Exception as problem:  # a setting may need more than this GPU or this Triton has
        return f"{type(problem).__name__}: {problem}"


def best_of_turns(ways: dict[str, Call], repeats: int) -> dict[str, float]:
    """Milliseconds of each way on the device; they take turns."""
    turns = [{way: device_ms(call, repeats, _AHEAD_CYCLES) for way, call in ways.items()} for _ in range(TURNS)]
    return {way: min(turn[way] for turn in turns) for way in ways}


def cold(shape: tuple[int, int]) -> Iterator[Packed]:
    """One weight at so many addresses that the cache has none when its turn comes again."""
    packed, absmax, state = layer_of(shape)[0].packed_weight()
    copies = copies_for(packed.nbytes)
    return itertools.cycle([(packed.clone(), absmax.clone(), state) for _ in range(copies)])


def copies_for(nbytes: int) -> int:
    """How many copies of ``nbytes`` are twice as large as the cache, or more."""
    cache: int = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return 2 * cache // nbytes + 2


def by_bitsandbytes(weights: Iterator[Packed]) -> Call:
    from flux_nf4.nf4_loader.linear import kernels

    return lambda: kernels.dequantise(*next(weights), DTYPE)


def by_kernel(weights: Iterator[Packed], setting: Setting) -> Call:
    return lambda: expand(*next(weights), DTYPE, setting)


def by_compiled_kernel(weights: Iterator[Packed], setting: Setting) -> Call:
    """The compiled kernel is called directly, as `int8_weight` does: Triton need not look at each argument."""
    packed, absmax, state = next(weights)
    out = torch.empty(state.shape, dtype=DTYPE, device=packed.device)
    code = code_of(state, packed.device)
    launch = launched(packed, absmax, code, out, setting)[grid_of(packed, setting)]
    numbers = (packed.numel() // 4, setting.lookup, setting.nbytes // 4)

    def call() -> torch.Tensor:
        packed, absmax, _ = next(weights)
        out = torch.empty(state.shape, dtype=DTYPE, device=packed.device)
        launch(packed.data_ptr(), absmax.data_ptr(), code.data_ptr(), out.data_ptr(), *numbers)
        return out

    return call


def expand(
    packed: torch.Tensor, absmax: torch.Tensor, state: Any, dtype: torch.dtype, setting: Setting
) -> torch.Tensor:
    """What `kernels.dequantise` does, by the kernel: for NF4 in whole blocks of 64."""
    out = torch.empty(state.shape, dtype=dtype, device=packed.device)
    launched(packed, absmax, code_of(state, packed.device), out, setting)
    return out


def launched(
    packed: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, out: torch.Tensor, setting: Setting
) -> Any:
    """The compiled kernel, which has been launched."""
    from expand_kernel import kernel

    launch = kernel[grid_of(packed, setting)]
    words, sizes = packed.numel() // 4, {"LOOKUP": setting.lookup, "WORDS": setting.nbytes // 4}
    return launch(packed, absmax, code, out, words, **sizes, num_warps=setting.warps)


def grid_of(packed: torch.Tensor, setting: Setting) -> tuple[int, int, int]:
    return -(-packed.numel() // setting.nbytes), 1, 1


def code_of(state: Any, device: torch.device) -> torch.Tensor:
    from flux_nf4.nf4_loader.linear.kernels import code_table

    return code_table(state.quant_type, device)


def plain_ways(nbytes: int) -> dict[str, Call]:
    """What moves ``nbytes`` and computes nothing: a copy, which reads half of them, and a fill, which reads none."""
    half, whole = (torch.empty(count // 4, dtype=torch.int32, device="cuda") for count in (nbytes // 2, nbytes))
    sources = itertools.cycle([torch.zeros_like(half) for _ in range(copies_for(half.nbytes))])
    return {COPY: lambda: half.copy_(next(sources)), FILL: lambda: whole.fill_(1)}


def compare_pairs(setting: Setting, pixels: list[int], repeats: int) -> list[Pair]:
    found = []
    for name, shape in SHAPES.items():
        weights = cold(shape)
        ways = {BNB: by_bitsandbytes(weights), setting.name: by_kernel(weights, setting)}
        for side in pixels:
            for rows in rows_of_pictures(name, [side]):
                input = torch.randn(rows, shape[1], device="cuda", dtype=DTYPE)
                pairs = {way: with_matmul(call, input) for way, call in ways.items()}
                found.append(Pair(side, name, rows, *best_of_turns(pairs, repeats).values()))
    return sorted(found, key=lambda pair: pixels.index(pair.pixels))


def with_matmul(expand: Call, input: torch.Tensor) -> Call:
    return lambda: torch.mm(input, expand().t())


def host_times(settings: list[Setting]) -> dict[str, float]:
    """The host's microseconds of a call, for one setting of each look-up: with all that Triton does at a launch, and
    with the compiled kernel called directly, as `int8_weight` does."""
    weights = cold(SHAPES["proj"])
    times = {BNB: host_us(by_bitsandbytes(weights))}
    for setting in {setting.lookup: setting for setting in reversed(settings)}.values():
        times[setting.name] = host_us(by_kernel(weights, setting))
        times[f"{setting.name}, directly"] = host_us(by_compiled_kernel(weights, setting))
    return times


def forward_ms(found: list[Row], way: str) -> float:
    """Of all layers of a forward."""
    return OF_EACH * sum(row.ms for row in found if row.way == way)


def best(found: list[Row], problems: dict[str, str]) -> Setting | None:
    """The setting that expands all layers of a forward in the least time."""
    usable = [setting for setting in SETTINGS if setting.name not in problems]
    return min(usable, key=lambda setting: forward_ms(found, setting.name), default=None)


def table(found: list[Row], problems: dict[str, str]) -> str:
    """A line for each way; then what a forward would gain."""
    lines = ["| ms (GB/s) | " + " | ".join(SHAPES) + " | all of a forward |", "|" + "---|" * (len(SHAPES) + 2)]
    for way in (BNB, COPY, FILL, *(setting.name for setting in SETTINGS if setting.name not in problems)):
        own = {row.layer: row for row in found if row.way == way}
        cells = [f"{own[name].ms:.4f} ({own[name].gbps:.0f})" for name in SHAPES]
        lines.append(f"| {way} | " + " | ".join(cells) + f" | {forward_ms(found, way):.2f} |")
    lines += ["", *(f"{name}: {problem}" for name, problem in problems.items())]
    if setting := best(found, problems):
        before, after = (forward_ms(found, way) for way in (BNB, setting.name))
        lines.append(
            f"{setting.name}: a forward would take {before - after:.2f} ms less, of {before:.2f} ms that bitsandbytes "
            f"takes to expand; at the speed of a copy it would take {before - forward_ms(found, COPY):.2f} ms less"
        )
    else:
        lines.append("no setting can be used here")
    return "\n".join(lines)


def table_of_pairs(found: list[Pair]) -> str:
    """A line for each layer and number of rows; then what a forward would gain, for each size of picture."""
    lines = ["| pixels | layer | rows | bitsandbytes and matmul, ms | kernel and matmul | ratio |", "|" + "---|" * 6]
    for pair in found:
        ratio = pair.kernel_ms / pair.bitsandbytes_ms
        times = f"{pair.bitsandbytes_ms:.4f} | {pair.kernel_ms:.4f} | {ratio:.3f}"
        lines.append(f"| {pair.pixels} | {pair.layer} | {pair.rows} | {times} |")
    lines.append("")
    for side in dict.fromkeys(pair.pixels for pair in found):
        own = [pair for pair in found if pair.pixels == side]
        counts = [OF_EACH // sum(pair.layer == other.layer for other in own) for pair in own]
        before, after = (
            sum(count * ms for count, ms in zip(counts, times, strict=True))
            for times in ([pair.bitsandbytes_ms for pair in own], [pair.kernel_ms for pair in own])
        )
        lines.append(
            f"{side}: all Linears of a forward would take {before - after:.2f} ms less, "
            f"{100 * (before - after) / before:.1f} % of {before:.1f} ms"
        )
    return "\n".join(lines)


def table_of_host(times: dict[str, float]) -> str:
    return "\n".join(["host us a launch:", *(f"{us:7.1f}  {way}" for way, us in times.items())])


def main() -> None:
    parser = parser_for(__doc__, can_be_dry=False)
    parser.add_argument("--pixels", type=positive, nargs="+", default=[1024, 512], help="sides of the pictures")
    parser.add_argument("--repeats", type=positive, default=30, help="timed calls of a turn")
    given = parser.parse_args()
    use_allocator_of_comfyui()
    begin(given)
    import_package()
    result: dict[str, Any] = {"about": about()}

    def write(name: str, value: Any) -> None:
        result[name] = value
        (given.output / "expand_kernels.json").write_text(json.dumps(result, indent=1))

    with torch.inference_mode():
        found, problems = measure(given.repeats)
        write("rows", [asdict(row) for row in found])
        write("problems", problems)
        print(table(found, problems), flush=True)
        if (setting := best(found, problems)) is None:
            return
        pairs = compare_pairs(setting, given.pixels, given.repeats)
        write("best", setting.name)
        write("pairs", [asdict(pair) for pair in pairs])
        print("\n" + table_of_pairs(pairs), flush=True)
        host = host_times([each for each in SETTINGS if each.name not in problems])
        write("host_us", host)
        print("\n" + table_of_host(host))


if __name__ == "__main__":
    orderly.run(main)
