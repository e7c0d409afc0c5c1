"""Would Triton kernels make a LoRA beside a quantised matmul cheaper? A trial: the package does not have them.

    COMFYUI_PATH=~/ComfyUI python benchmarks/low_rank_kernels.py
    COMFYUI_PATH=~/ComfyUI python benchmarks/low_rank_kernels.py --rank 32 --pixels 1024

For each shape of Flux's Linears, at the rows that pictures of so many pixels a side have, it prints what the two halves
of a LoRA take on the device, by torch as the package has them and by two Triton kernels: the input by ``down``, and
what ``up`` adds to the output. Then the sums over a forward for each setting of the kernels, and beside them the time
to move the same bytes as fast as this GPU copies. No input or output is still in the L2 cache of what was measured
before. Run it with ComfyUI's Python. It also writes ``low_rank_kernels.json``, and ends with an error if a result is
wrong.
"""

import functools
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import needs_torch  # noqa: F401
import orderly
import torch
from about import about
from arguments import begin, parser_for, positive
from inside_comfyui import import_package, use_allocator_of_comfyui
from int8_layers import OF_EACH, SHAPES, TEXT_TOKENS, device_ms, error, host_us, rows_of_pictures

if TYPE_CHECKING:
    from low_rank_kernel import Add, Partial

SCALE = 0.75
COLD_BYTES = 1 << 28
"""Tensors that are used in turn have so many bytes together: twice the largest L2 cache, of 126 MB (a B200)."""

MOST_SUM_ERROR = 1e-4
"""The kernel sums in fp32, like what it is compared with, in another order."""

TORCH, TRITON, BYTES = "torch", "Triton", "bytes"
"""The ways; the last is the time to move the bytes."""

HALVES = ("down", "up")


class Tensors(NamedTuple):
    """Of one Linear's LoRA: down (R, in), up (out, R), bf16; scale fp32 (R,); the package's own; what it brings up."""

    down: torch.Tensor
    up: torch.Tensor
    scale: torch.Tensor
    branch: Any
    on_device: dict[str, torch.Tensor]


def lora_of(shape: tuple[int, int], rank: int) -> Tensors:
    """A LoRA whose product is as large as its input, times the scale."""
    from flux_nf4.low_rank.branch import LowRank
    from flux_nf4.low_rank.factors import Factors

    out, columns = shape
    factors = Factors(torch.randn(out, rank) / math.sqrt(rank), torch.randn(rank, columns) / columns**0.5, SCALE, 0)
    branch = LowRank([factors], torch.bfloat16)
    on_device = {name: tensor.cuda() for name, tensor in branch.tensors.items()}
    return Tensors(on_device["lora_down"], on_device["lora_up_0"], on_device["lora_scale"], branch, on_device)


def in_turn(rows: int, columns: int) -> Iterator[torch.Tensor]:
    """bf16 (rows, columns) from so many that each has left the cache when it comes again."""
    count = math.ceil(COLD_BYTES / (2 * rows * columns))
    made = [torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    return itertools.cycle(made)


def copy_gbps(repeats: int) -> float:
    """1e9 bytes a second that this GPU reads and writes, both counted, as it copies its own memory."""
    source = torch.zeros(4 * COLD_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / device_ms(lambda: target.copy_(source), repeats) / 1e6


def bytes_of(rows: int, shape: tuple[int, int], rank: int) -> dict[str, int]:
    """What each half has to move in bf16: it reads its factor and the input, or its factor and the output, twice."""
    out, columns = shape
    return {"down": 2 * columns * (rows + rank), "up": 2 * out * (2 * rows + rank)}


def name_of(setting: Sequence[int]) -> str:
    return "/".join(map(str, setting))


class Trial:
    """Times of both halves by torch and by each setting. A setting that fails once is not tried again."""

    def __init__(self, rank: int, repeats: int) -> None:
        self._rank = rank
        self._repeats = repeats
        self._known: dict[tuple[str, int, int], dict[str, float]] = {}
        """By half, rows, columns: Linears of which a half is as large are measured once."""
        self.problems: dict[str, str] = {}

    def down(self, rows: int, lora: Tensors, settings: Sequence["Partial"]) -> dict[str, float]:
        """ms by torch and by each setting of `partial_kernel`."""
        from low_rank_kernel import partial

        key = ("down", rows, lora.down.shape[1])
        if key in self._known:
            return self._known[key]
        inputs = in_turn(rows, lora.down.shape[1])
        x = next(inputs)
        expected = x.float() @ lora.down.float().t()

        def off(setting: "Partial") -> float:
            return error(partial(x, lora.down, setting).sum(0)[:, : self._rank], expected)

        times = {TORCH: device_ms(lambda: torch.nn.functional.linear(next(inputs), lora.down), self._repeats)}
        times |= self._each(key, settings, lambda own: partial(next(inputs), lora.down, own), off, MOST_SUM_ERROR)
        self._known[key] = times
        return times

    def up(self, rows: int, lora: Tensors, before: "Partial", settings: Sequence["Add"]) -> dict[str, float]:
        """ms by torch and by each setting of `add_kernel`, behind a `partial_kernel` with the setting ``before``."""
        from low_rank_kernel import add, partial

        key = ("up", rows, len(lora.up))
        if key in self._known:
            return self._known[key]
        outputs, x = in_turn(rows, len(lora.up)), next(in_turn(rows, lora.down.shape[1]))
        output, product = next(outputs), product_of(x, lora)
        sums, hidden = partial(x, lora.down, before), torch.nn.functional.linear(x, lora.down)

        def by_torch(to: torch.Tensor) -> None:
            to.addmm_(hidden, lora.up.t(), alpha=SCALE)

        def by_triton(to: torch.Tensor, setting: "Add") -> None:
            add(to, sums, lora.up, lora.scale, setting)

        def off(setting: "Add") -> float:
            return added_error(lambda to: by_triton(to, setting), output, product)

        times = {TORCH: device_ms(lambda: by_torch(next(outputs)), self._repeats)}
        most = most_error(added_error(by_torch, output, product))
        times |= self._each(key, settings, lambda own: by_triton(next(outputs), own), off, most)
        self._known[key] = times
        return times

    def _each(
        self,
        key: tuple[str, int, int],
        settings: Sequence[Any],
        call: Callable[[Any], Any],
        off: Callable[[Any], float],
        most: float,
    ) -> dict[str, float]:
        """ms of ``call`` with each setting that works and is ``off`` by at most so much."""
        half, rows, columns = key
        times = {}
        for setting in settings:
            named = f"{half} {name_of(setting)}"
            if named in self.problems:
                continue
            try:
                if not (found := off(setting)) <= most:
                    raise ValueError(f"wrong values: error {found:.5f}, at most {most:.5f}")
                times[name_of(setting)] = device_ms(lambda own=setting: call(own), self._repeats)  # type: ignore[misc]
            except Exception as problem:  # a setting may need more than this GPU has
                self.problems[named] = f"{rows} rows, {columns} columns: {type(problem).__name__}: {problem}"
                print(f"{named}: {self.problems[named]}", flush=True)
        return times


def product_of(x: torch.Tensor, lora: Tensors) -> torch.Tensor:
    """What the LoRA adds, in fp32."""
    return SCALE * (x.float() @ lora.down.float().t()) @ lora.up.float().t()


def added_error(add: Callable[[torch.Tensor], Any], output: torch.Tensor, product: torch.Tensor) -> float:
    """Of what ``add`` adds to a copy of ``output``, the rounding of the sum included, beside ``product`` in fp32."""
    after = output.clone()
    add(after)
    return error(after.float() - output.float(), product)


def most_error(by_torch: float) -> float:
    """How far Triton's product may be from fp32, where torch's is so far."""
    return 1.05 * by_torch + 1e-4


def both(rows: int, lora: Tensors, settings: tuple["Partial", "Add"], repeats: int) -> dict[str, Any]:
    """ms and errors of the package's `LowRank.add_to`, and of both kernels one after the other."""
    inputs, outputs = in_turn(rows, lora.down.shape[1]), in_turn(rows, len(lora.up))
    x, output = next(inputs), next(outputs)
    product = product_of(x, lora)
    found: dict[str, Any] = {"both": {}, "errors": {}}
    for way, call in ways_of(lora, settings).items():
        found["errors"][way] = added_error(lambda to, call=call: call(to, x), output, product)  # type: ignore[misc]
        found["both"][way] = device_ms(lambda call=call: call(next(outputs), next(inputs)), repeats)  # type: ignore[misc]
    return found


def ways_of(
    lora: Tensors, settings: tuple["Partial", "Add"]
) -> dict[str, Callable[[torch.Tensor, torch.Tensor], None]]:
    """Calls that add the branch of their second tensor to the first."""
    from low_rank_kernel import add, partial

    first, second = settings
    return {
        TORCH: lambda to, x: lora.branch.add_to(to, x, lora.on_device),
        TRITON: lambda to, x: add(to, partial(x, lora.down, first), lora.up, lora.scale, second),
    }


def hosts_us(lora: Tensors, settings: tuple["Partial", "Add"]) -> dict[str, float]:
    """The host's microseconds a layer, by the way."""
    x, output = next(in_turn(TEXT_TOKENS, lora.down.shape[1])), next(in_turn(TEXT_TOKENS, len(lora.up)))
    return {way: host_us(functools.partial(call, output, x)) for way, call in ways_of(lora, settings).items()}


def forward_ms(found: Sequence[dict[str, Any]], part: str, way: str, side: int) -> float | None:
    """Of a picture's whole forward, from ``row[part][way]`` ms of each layer; None if one has none."""
    total = 0.0
    for name in SHAPES:
        counts = rows_of_pictures(name, [side])
        for count in counts:
            row = next(row for row in found if (row["layer"], row["rows"]) == (name, count))
            if way not in row[part]:
                return None
            total += OF_EACH / len(counts) * row[part][way]
    return total


def fastest(found: Sequence[dict[str, Any]], half: str, settings: Sequence[Any], pixels: Sequence[int]) -> Any:
    """The one setting for all shapes with which the forwards of all these pictures together take least; or None."""
    totals = {}
    for setting in settings:
        each = [forward_ms(found, half, name_of(setting), side) for side in pixels]
        if None not in each:
            totals[setting] = sum(ms for ms in each if ms is not None)
    return min(totals, key=lambda setting: totals[setting], default=None)


def measure(rank: int, pixels: Sequence[int], repeats: int) -> dict[str, Any]:
    """
    Raises:
        SystemExit: no setting of a kernel works.
    """
    from low_rank_kernel import ADDS, PARTIALS

    torch.manual_seed(0)
    gbps = copy_gbps(repeats)
    loras = {name: lora_of(shape, rank) for name, shape in SHAPES.items()}
    found: list[dict[str, Any]] = []
    for name, shape in SHAPES.items():
        for count in sorted(set(rows_of_pictures(name, list(pixels)))):
            row: dict[str, Any] = {"layer": name, "rows": count}
            row["bytes"] = {half: n / gbps / 1e6 for half, n in bytes_of(count, shape, rank).items()}
            found.append(row)
    trial = Trial(rank, repeats)
    result = {"rank": rank, "pixels": list(pixels), "copy_gbps": gbps, "problems": trial.problems, "rows": found}
    for row in found:
        row["down"] = trial.down(row["rows"], loras[row["layer"]], PARTIALS)
    first = fastest(found, "down", PARTIALS, pixels)
    if first is None:
        sys.exit("no setting of partial_kernel works on this GPU")
    for row in found:
        row["up"] = trial.up(row["rows"], loras[row["layer"]], first, ADDS)
    second = fastest(found, "up", ADDS, pixels)
    if second is None:
        sys.exit("no setting of add_kernel works on this GPU")
    for row in found:
        row |= both(row["rows"], loras[row["layer"]], (first, second), repeats)
    best = {"down": name_of(first), "up": name_of(second)}
    return result | {"best": best, "host_us": hosts_us(loras["proj"], (first, second))}


def table(result: dict[str, Any]) -> str:
    """A line for each layer and its rows; for each setting; for each picture."""
    best, found, pixels = result["best"], result["rows"], result["pixels"]
    lines = [
        "| layer | rows | down: torch, ms | Triton | bytes | up: torch, ms | Triton | bytes | both: torch, ms | Triton "
        "| error: torch | Triton |",
        "|" + "---|" * 12,
    ]
    for row in found:
        halves = [ms for half in HALVES for ms in (row[half][TORCH], row[half][best[half]], row["bytes"][half])]
        times = " | ".join(f"{ms:.4f}" for ms in (*halves, row["both"][TORCH], row["both"][TRITON]))
        errors = " | ".join(f"{row['errors'][way]:.5f}" for way in (TORCH, TRITON))
        lines.append(f"| {row['layer']} | {row['rows']} | {times} | {errors} |")
    lines += ["", f"| a forward, ms | {' | '.join(map(str, pixels))} |", "|---|" + "---|" * len(pixels)]
    for half, what in (("down", "rows/columns/programs/warps/stages"), ("up", "rows/columns/tiles/warps/stages")):
        ways = dict.fromkeys(way for row in found for way in row[half])
        for way in ways:
            each = [forward_ms(found, half, way, side) for side in pixels]
            cells = ["fails" if ms is None else f"{ms:.2f}" for ms in each]
            said = way if way == TORCH else f"{what} {way}"
            lines.append(f"| {half}, {said} | {' | '.join(cells)} |")
    lines += ["", *(summary(result, side) for side in pixels)]
    host = result["host_us"]
    lines.append(f"the host: {host[TORCH]:.1f} us a layer by torch, {host[TRITON]:.1f} by Triton")
    return "\n".join(lines)


def summary(result: dict[str, Any], side: int) -> str:
    """What the LoRA of a picture's forward takes."""
    found, best = result["rows"], result["best"]
    whole = {way: forward_ms(found, "both", way, side) for way in (TORCH, TRITON)}
    halves = {
        TORCH: [forward_ms(found, half, TORCH, side) for half in HALVES],
        TRITON: [forward_ms(found, half, best[half], side) for half in HALVES],
        BYTES: [forward_ms(found, "bytes", half, side) for half in HALVES],
    }
    said = {way: " + ".join("-" if ms is None else f"{ms:.2f}" for ms in each) for way, each in halves.items()}
    return (
        f"{side}: a forward's LoRA takes {whole[TORCH]:.2f} ms by torch (down + up alone: {said[TORCH]}), "
        f"{whole[TRITON]:.2f} by Triton ({said[TRITON]}); to move the bytes at {result['copy_gbps']:.0f} GB/s takes "
        f"{said[BYTES]}"
    )


def wrong(found: Sequence[dict[str, Any]]) -> list[str]:
    """Layers where Triton's sum is further from fp32 than torch's."""
    return [
        f"{row['layer']}, {row['rows']} rows: wrong values: error {row['errors'][TRITON]:.5f}"
        for row in found
        if not row["errors"][TRITON] <= most_error(row["errors"][TORCH])
    ]


def main() -> None:
    parser = parser_for(__doc__, can_be_dry=False)
    parser.add_argument("--rank", type=positive, default=16, help="of the LoRA")
    parser.add_argument("--pixels", type=positive, nargs="+", default=[512, 1024, 1536], help="sides of the pictures")
    parser.add_argument("--repeats", type=positive, default=20, help="timed calls of a way")
    given = parser.parse_args()
    use_allocator_of_comfyui()
    begin(given)
    import_package()
    with torch.inference_mode():
        result = measure(given.rank, given.pixels, given.repeats)
    (given.output / "low_rank_kernels.json").write_text(json.dumps({"about": about()} | result, indent=1))
    print(table(result))
    if said := wrong(result["rows"]):
        sys.exit("\n".join(said))


if __name__ == "__main__":
    orderly.run(main)
