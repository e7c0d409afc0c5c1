"""What the Triton kernels of the package (`low_rank.beside`) win over torch where a LoRA is computed beside a matmul.

    COMFYUI_PATH=~/ComfyUI python benchmarks/low_rank_kernels.py
    COMFYUI_PATH=~/ComfyUI python benchmarks/low_rank_kernels.py --rank 4 --pixels 1024

For each shape of Flux's Linears, at the rows that pictures of so many pixels a side have, it prints what the LoRA takes
on the device by torch and by the kernels, the time to move the same bytes as fast as this GPU copies, and how far both
are from fp32. Then the sums over a forward, and the host's time of a layer. No input or output is still in the L2 cache
of what was measured before. Run it with ComfyUI's Python. It also writes ``low_rank_kernels.json``, and ends with an
error if the kernels cannot be used or give wrong values.
"""

import functools
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import needs_torch  # noqa: F401
import orderly
import torch
from about import about
from arguments import begin, parser_for, positive
from inside_comfyui import import_package, use_allocator_of_comfyui
from int8_layers import OF_EACH, SHAPES, TEXT_TOKENS, device_ms, error, host_us, rows_of_pictures

SCALE = 0.75
COLD_BYTES = 1 << 28
"""Tensors that are used in turn have so many bytes together: twice the largest L2 cache, of 126 MB (a B200)."""

TORCH, TRITON = WAYS = ("torch", "Triton")
TURNS = 3
"""The least of so many medians counts: what else goes on only adds to it."""

AddTo = Callable[[torch.Tensor, torch.Tensor], None]
"""Adds the branch of its second tensor to the first."""


@dataclass(frozen=True)
class Row:
    """One Linear's LoRA at so many rows of input: ms and errors by the way, and ms to move its bytes."""

    layer: str
    rows: int
    ms: dict[str, float]
    bytes_ms: float
    errors: dict[str, float]

    @property
    def is_wrong(self) -> bool:
        """Whether Triton's result is further from fp32 than torch's."""
        return not self.errors[TRITON] <= 1.05 * self.errors[TORCH] + 1e-4


class Branch:
    """A LoRA of one Linear whose product is as large as its input, times the scale."""

    def __init__(self, shape: tuple[int, int], rank: int) -> None:
        out, columns = shape
        self._down = (torch.randn(rank, columns) / columns**0.5).cuda().bfloat16()
        self._up = (torch.randn(out, rank) / math.sqrt(rank)).cuda().bfloat16()
        self._scale = torch.full((rank,), SCALE).cuda()
        self.ways: dict[str, AddTo] = {TORCH: self._by_torch, TRITON: self._by_triton}

    def _by_torch(self, output: torch.Tensor, input: torch.Tensor) -> None:
        output.addmm_(torch.nn.functional.linear(input, self._down), self._up.t(), alpha=SCALE)

    def _by_triton(self, output: torch.Tensor, input: torch.Tensor) -> None:
        from flux_nf4.low_rank import beside

        beside.add(output, input, self._down, self._up, self._scale)

    def errors(self, output: torch.Tensor, input: torch.Tensor) -> dict[str, float]:
        """Of what each way adds to a copy of ``output``, the rounding of the sum included, against fp32."""
        product = SCALE * (input.float() @ self._down.float().t()) @ self._up.float().t()
        found = {}
        for way, add_to in self.ways.items():
            after = output.clone()
            add_to(after, input)
            found[way] = error(after.float() - output.float(), product)
        return found


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


def bytes_of(rows: int, shape: tuple[int, int], rank: int) -> int:
    """What has to move in bf16: both factors and the input once, the output twice."""
    out, columns = shape
    return 2 * columns * (rows + rank) + 2 * out * (2 * rows + rank)


def measure(rank: int, pixels: Sequence[int], repeats: int) -> list[Row]:
    """
    Raises:
        SystemExit: the kernels cannot be used here, or not for this rank.
    """
    from flux_nf4.low_rank import beside

    if rank > beside.MOST_RANKS:
        sys.exit(f"the kernels are for ranks up to {beside.MOST_RANKS}")
    if problem := beside.problem_on(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16):
        sys.exit(f"the kernels cannot be used: {problem}")
    torch.manual_seed(0)
    gbps = copy_gbps(repeats)
    found = []
    for name, shape in SHAPES.items():
        branch = Branch(shape, rank)
        for rows in sorted(set(rows_of_pictures(name, list(pixels)))):
            inputs, outputs = in_turn(rows, shape[1]), in_turn(rows, shape[0])
            errors = branch.errors(next(outputs), next(inputs))
            calls = {way: functools.partial(_next, add_to, outputs, inputs) for way, add_to in branch.ways.items()}
            turns = [{way: device_ms(call, repeats) for way, call in calls.items()} for _ in range(TURNS)]
            ms = {way: min(turn[way] for turn in turns) for way in WAYS}
            found.append(Row(name, rows, ms, bytes_of(rows, shape, rank) / gbps / 1e6, errors))
    return found


def _next(add_to: AddTo, outputs: Iterator[torch.Tensor], inputs: Iterator[torch.Tensor]) -> None:
    add_to(next(outputs), next(inputs))


def hosts_us(rank: int) -> dict[str, float]:
    """The host's microseconds a layer."""
    branch = Branch(SHAPES["proj"], rank)
    inputs, outputs = (in_turn(TEXT_TOKENS, size) for size in reversed(SHAPES["proj"]))
    return {way: host_us(functools.partial(_next, add_to, outputs, inputs)) for way, add_to in branch.ways.items()}


def forward_ms(found: Sequence[Row], side: int, ms_of: Callable[[Row], float]) -> float:
    """Of a picture's whole forward."""
    total = 0.0
    for name in SHAPES:
        counts = rows_of_pictures(name, [side])
        own = [row for count in counts for row in found if (row.layer, row.rows) == (name, count)]
        total += OF_EACH / len(counts) * sum(map(ms_of, own))
    return total


def table(found: Sequence[Row], pixels: Sequence[int]) -> str:
    """A line for each layer and its rows; then what a picture's forward takes."""
    lines = ["| layer | rows | torch, ms | Triton | bytes | error: torch | Triton |", "|" + "---|" * 7]
    for row in found:
        times = " | ".join(f"{ms:.4f}" for ms in (*row.ms.values(), row.bytes_ms))
        errors = " | ".join(f"{row.errors[way]:.5f}" for way in WAYS)
        lines.append(f"| {row.layer} | {row.rows} | {times} | {errors} |")
    lines.append("")
    for side in pixels:
        by_torch, by_triton = (forward_ms(found, side, lambda row, way=way: row.ms[way]) for way in WAYS)  # type: ignore[misc]
        least = forward_ms(found, side, lambda row: row.bytes_ms)
        lines.append(
            f"{side}: a forward's LoRA takes {by_torch:.2f} ms by torch, {by_triton:.2f} by Triton, and to move the "
            f"bytes takes {least:.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = parser_for(__doc__, can_be_dry=False)
    parser.add_argument("--rank", type=positive, default=16, help="of the LoRA")
    parser.add_argument("--pixels", type=positive, nargs="+", default=[512, 1024, 1536], help="sides of the pictures")
    parser.add_argument("--repeats", type=positive, default=20, help="timed calls of a turn")
    given = parser.parse_args()
    use_allocator_of_comfyui()
    begin(given)
    import_package()
    with torch.inference_mode():
        found, host = measure(given.rank, given.pixels, given.repeats), hosts_us(given.rank)
    result = {"about": about(), "rank": given.rank, "rows": [asdict(row) for row in found], "host_us": host}
    (given.output / "low_rank_kernels.json").write_text(json.dumps(result, indent=1))
    print(table(found, given.pixels))
    print(f"the host: {host[TORCH]:.1f} us a layer by torch, {host[TRITON]:.1f} by Triton")
    if wrong := [f"{row.layer}, {row.rows} rows" for row in found if row.is_wrong]:
        sys.exit(f"wrong values: {'; '.join(wrong)}")


if __name__ == "__main__":
    orderly.run(main)
