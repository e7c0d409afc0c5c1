"""An experiment: what is won if the modulation of all steps were computed once, and its weights never streamed.

    COMFYUI_PATH=~/ComfyUI python benchmarks/modulation.py

The modulation Linears are 27 % of the blocks' bytes and see nothing but the timestep, the guidance and the pooled
prompt: for a sampling whose schedule is known their outputs are 2.1 MB a step. Here two models run in turns, all blocks
streamed: one as it is, and one in which those layers give what they gave before. That is the most that it can win.
Outputs must be bit-equal, or it fails. Run it with ComfyUI's Python; it prints a table and writes ``modulation.json``.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import needs_torch  # noqa: F401
import torch
from arguments import begin, parser_for
from bus import slow_bus
from cases import Case
from inside_comfyui import import_package
from timing import milliseconds, seconds
from torch import nn
from weights import Files

MODULATION = ("img_mod", "txt_mod", "modulation")
TINY_SIZES = [Case("", pixels, text_tokens=8) for pixels in (64, 96)]


class Remembered(nn.Module):
    """A Linear that computes each input once. It holds its weights where no one who walks the model sees them."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self._linear = [linear]
        self._output: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._output is None:  # a case asks for one input only
            self._output = self._linear[0].to(x.device)(x)
            self._linear[0].to("cpu")
        return self._output

    def forget(self) -> None:
        """Begin anew: another case has another input."""
        self._output = None


def load_remembered(path: Path) -> tuple[Any, list[Remembered], int]:
    """A streamed model without the modulation's weights in its blocks, what is in their place, and their bytes."""
    import comfy.model_management

    from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue
    from flux_nf4.nf4_loader.models.fill import fill
    from flux_nf4.nf4_loader.models.transformers import block_groups, build_flux, materialise
    from flux_nf4.offload.comfyui.patcher import StreamedModelPatcher
    from flux_nf4.offload.comfyui.streaming import attach_streaming

    catalogue = read_catalogue(path)
    model = build_flux(catalogue)
    materialise(model.diffusion_model)
    fill(model, catalogue, lambda _: None)
    groups, remembered, nbytes = block_groups(model), [], 0
    modulation: Any
    for block in (block for group in groups.values() for block in group):
        for modulation in (child for name, child in block.named_children() if name in MODULATION):
            nbytes += sum(tensor.nbytes for tensor in (*modulation.lin.parameters(), *modulation.lin.buffers()))
            modulation.lin = Remembered(modulation.lin)
            remembered.append(modulation.lin)
    attach_streaming(model, groups)
    management = comfy.model_management
    patcher = StreamedModelPatcher(
        model, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )
    return patcher, remembered, nbytes


def measure(patchers: dict[str, Any], case: Case, rounds: int, calls: int) -> dict[str, Any]:
    """Median ms of each model, in turns; the first call of the second is what remembering costs."""
    from comfy_model import at_work
    from streamed import with_residency

    row: dict[str, Any] = {"pixels": case.pixels}
    times: dict[str, list[float]] = {name: [] for name in patchers}
    outputs = []
    device = next(iter(patchers.values())).load_device
    with slow_bus(device, case.bus_gbps) as row["bus_gbps"]:
        for _ in range(rounds):
            for name, patcher in patchers.items():
                with at_work(with_residency(patcher, 0, 0), case) as model:
                    model.load()
                    row.setdefault(f"{name}_first_ms", 1000 * seconds(model.forward, device))
                    outputs.append(model.forward().clone())
                    times[name] += milliseconds(model.forward, calls, device)
    if not all(torch.equal(output, outputs[0]) for output in outputs):
        sys.exit(f"{case.name}: remembered outputs give another picture")
    return row | {f"{name}_ms": statistics.median(values) for name, values in times.items()}


def run(files: Files, cases: Sequence[Case], rounds: int, calls: int, output: Path) -> dict[str, Any]:
    """Measure each case; the figures so far are in ``output`` after each."""
    from streamed import load

    with torch.inference_mode():
        patcher, remembered, nbytes = load_remembered(files.nf4())
        patchers = {"streamed": load(files.nf4()), "remembered": patcher}
        results: dict[str, Any] = {"modulation_bytes": nbytes, "rows": []}
        for case in cases:
            for layer in remembered:
                layer.forget()
            results["rows"].append(measure(patchers, case, rounds, calls))
            (output / "modulation.json").write_text(json.dumps(results))
    return results


def table(results: dict[str, Any]) -> str:
    lines = ["| picture | bus GB/s | streamed ms | remembered ms | ratio |", "|---" * 5 + "|"]
    for row in results["rows"]:
        ratio = row["remembered_ms"] / row["streamed_ms"]
        bus = f"{row['bus_gbps']:.1f}" if row["bus_gbps"] else "as it is"
        lines.append(
            f"| {row['pixels']} | {bus} | {row['streamed_ms']:.1f} | {row['remembered_ms']:.1f} | {ratio:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each model at each case")
    parser.add_argument("--calls", type=int, default=8, help="timed calls of a turn")
    given = parser.parse_args()
    begin(given)
    import_package()
    files = Files(given.folder, given.checkpoint, given.dry_run)
    files.enter()
    cases = [Case("", pixels, bus_gbps=gbps) for pixels in (1024, 512) for gbps in (0.0, 25.0, 12.0)]
    results = run(files, TINY_SIZES if given.dry_run else cases, given.rounds, given.calls, given.output)
    print(f"{results['modulation_bytes'] / 1e9:.2f} GB of modulation weights\n{table(results)}")


if __name__ == "__main__":
    main()
