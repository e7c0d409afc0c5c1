"""What a Triton kernel of the package (`expanded_weight`) wins over bitsandbytes where it expands NF4 weights to bf16.

    COMFYUI_PATH=~/ComfyUI python benchmarks/expand_kernels.py --output results

For each shape of Flux's Linears it prints the time of bitsandbytes and of the kernel, and GB/s of the bytes that they
read and write, beside a copy and a fill on the device that move as many bytes; what a forward takes less; then the same
for expanding and the matmul after it, with the rows that pictures have; and the host's time of a launch. Weights lie at
other addresses in each call, as in a forward, so that none is read from the cache. Run it with ComfyUI's Python. It
also writes ``expand_kernels.json``, and ends with an error if the kernel cannot be used or gives other bits.
"""

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import needs_torch  # noqa: F401
import orderly
import torch
from about import about
from arguments import begin, parser_for, positive
from inside_comfyui import import_package, use_allocator_of_comfyui
from int8_layers import OF_EACH, SHAPES, Packed, by_bitsandbytes, device_ms, host_us, layer_of, rows_of_pictures

DTYPE = torch.bfloat16
BNB, TRITON, COPY, FILL = WAYS = ("bitsandbytes", "Triton", "copy", "fill")

TURNS = 3
"""The least of so many medians counts: what else goes on only adds to it."""

_AHEAD_CYCLES = 20_000_000
"""About a hundredth of a second, in which the host enqueues what is timed."""


Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Row:
    """``way`` is one of WAYS; ``gbps`` are 1e9 bytes a second, read and written."""

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
    triton_ms: float


def measure(repeats: int) -> list[Row]:
    """Each shape in each way.

    Raises:
        SystemExit: the kernel cannot be used here, or gives other bits than bitsandbytes.
    """
    from flux_nf4.nf4_loader.linear import expanded_weight

    if problem := expanded_weight.problem_on(torch.device("cuda", torch.cuda.current_device()), DTYPE):
        sys.exit(f"the kernel cannot be used: {problem}")
    found = []
    for name, shape in SHAPES.items():
        weights = cold(shape)
        packed, absmax, state = next(weights)
        if not torch.equal(by_triton(packed, absmax, state), by_bitsandbytes(packed, absmax, state)):
            sys.exit(f"{name}: other bits than bitsandbytes")
        moved = packed.nbytes + absmax.nbytes + 2 * shape[0] * shape[1]
        times = best_of_turns(ways_of(weights) | plain_ways(moved), repeats)
        found += [Row(name, way, ms, moved / ms / 1e6) for way, ms in times.items()]
    return found


def ways_of(weights: Iterator[Packed]) -> dict[str, Call]:
    return {BNB: lambda: by_bitsandbytes(*next(weights)), TRITON: lambda: by_triton(*next(weights))}


def by_triton(packed: torch.Tensor, absmax: torch.Tensor, state: Any) -> torch.Tensor:
    from flux_nf4.nf4_loader.linear import expanded_weight

    return expanded_weight.expand(packed, absmax, state, DTYPE, None)


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


def plain_ways(nbytes: int) -> dict[str, Call]:
    """What moves ``nbytes`` and computes nothing: a copy, which reads half of them, and a fill, which reads none."""
    half, whole = (torch.empty(count // 4, dtype=torch.int32, device="cuda") for count in (nbytes // 2, nbytes))
    sources = itertools.cycle([torch.zeros_like(half) for _ in range(copies_for(half.nbytes))])
    return {COPY: lambda: half.copy_(next(sources)), FILL: lambda: whole.fill_(1)}


def compare_pairs(pixels: list[int], repeats: int) -> list[Pair]:
    found = []
    for name, shape in SHAPES.items():
        weights = cold(shape)
        ways = ways_of(weights)
        for side in pixels:
            for rows in rows_of_pictures(name, [side]):
                input = torch.randn(rows, shape[1], device="cuda", dtype=DTYPE)
                pairs = {way: with_matmul(call, input) for way, call in ways.items()}
                found.append(Pair(side, name, rows, *best_of_turns(pairs, repeats).values()))
    return sorted(found, key=lambda pair: pixels.index(pair.pixels))


def with_matmul(expand: Call, input: torch.Tensor) -> Call:
    return lambda: torch.mm(input, expand().t())


def host_times() -> dict[str, float]:
    """The host's microseconds of a call."""
    return {way: host_us(call) for way, call in ways_of(cold(SHAPES["proj"])).items()}


def forward_ms(found: list[Row], way: str) -> float:
    """Of all layers of a forward."""
    return OF_EACH * sum(row.ms for row in found if row.way == way)


def table(found: list[Row]) -> str:
    """A line for each way; then what a forward gains."""
    lines = ["| ms (GB/s) | " + " | ".join(SHAPES) + " | all of a forward |", "|" + "---|" * (len(SHAPES) + 2)]
    for way in WAYS:
        own = {row.layer: row for row in found if row.way == way}
        cells = [f"{own[name].ms:.4f} ({own[name].gbps:.0f})" for name in SHAPES]
        lines.append(f"| {way} | " + " | ".join(cells) + f" | {forward_ms(found, way):.2f} |")
    before, after, copied = (forward_ms(found, way) for way in (BNB, TRITON, COPY))
    lines += [
        "",
        f"a forward takes {before - after:.2f} ms less, of {before:.2f} ms that bitsandbytes takes to expand; at the "
        f"speed of a copy it takes {before - copied:.2f} ms less",
    ]
    return "\n".join(lines)


def table_of_pairs(found: list[Pair]) -> str:
    """A line for each layer and number of rows; then what a forward gains, for each size of picture."""
    lines = ["| pixels | layer | rows | bitsandbytes and matmul, ms | Triton and matmul | ratio |", "|" + "---|" * 6]
    for pair in found:
        ratio = pair.triton_ms / pair.bitsandbytes_ms
        times = f"{pair.bitsandbytes_ms:.4f} | {pair.triton_ms:.4f} | {ratio:.3f}"
        lines.append(f"| {pair.pixels} | {pair.layer} | {pair.rows} | {times} |")
    lines.append("")
    for side in dict.fromkeys(pair.pixels for pair in found):
        own = [pair for pair in found if pair.pixels == side]
        counts = [OF_EACH // sum(pair.layer == other.layer for other in own) for pair in own]
        before, after = (
            sum(count * ms for count, ms in zip(counts, times, strict=True))
            for times in ([pair.bitsandbytes_ms for pair in own], [pair.triton_ms for pair in own])
        )
        lines.append(
            f"{side}: all Linears of a forward take {before - after:.2f} ms less, "
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
        found = measure(given.repeats)
        write("rows", [asdict(row) for row in found])
        print(table(found), flush=True)
        pairs = compare_pairs(given.pixels, given.repeats)
        write("pairs", [asdict(pair) for pair in pairs])
        print("\n" + table_of_pairs(pairs), flush=True)
        host = host_times()
        write("host_us", host)
        print("\n" + table_of_host(host))


if __name__ == "__main__":
    orderly.run(main)
