"""An experiment: what is won if the modulation of all steps were computed once, and its weights never streamed.

    COMFYUI_PATH=~/ComfyUI python benchmarks/modulation.py --output results

The modulation Linears are 27 % of the blocks' bytes and see nothing but the timestep, the guidance and the pooled
prompt: for a sampling whose schedule is known their outputs are 2.1 MB a step. Here two models run in turns, all blocks
streamed: one as it is, and one in which those layers give what they gave before. That is the most that it can win.
Outputs must be bit-equal, or it fails. Run it with ComfyUI's Python; it prints a table and writes ``modulation.json``.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from arguments import parse, parser_for
from bus import slow_bus
from cases import Case
from inside_comfyui import import_package
from timing import milliseconds, seconds
from torch import nn
from weights import Files

MODULATION = ("img_mod", "txt_mod", "modulation")


class Remembered(nn.Module):
    """A Linear that computes each input once. It holds its weights where no one who walks the model sees them."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self._linear = [linear]
        self._outputs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self._outputs:  # one input only is ever asked for here
            self._outputs.append((x, self._linear[0].to(x.device)(x)))
            self._linear[0].to("cpu")
        return self._outputs[0][1]


def load_remembered(path: Path) -> tuple[Any, int]:
    """A streamed model without the modulation's weights in its blocks, and how many bytes those are."""
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
    groups, nbytes = block_groups(model), 0
    modulation: Any
    for block in (block for group in groups.values() for block in group):
        for modulation in (child for name, child in block.named_children() if name in MODULATION):
            nbytes += sum(tensor.nbytes for tensor in (*modulation.lin.parameters(), *modulation.lin.buffers()))
            modulation.lin = Remembered(modulation.lin)
    attach_streaming(model, groups)
    management = comfy.model_management
    patcher = StreamedModelPatcher(
        model, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )
    return patcher, nbytes


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


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=8)
    given = parse(parser)
    import_package()
    from streamed import load

    files = Files(given.folder, given.checkpoint, given.dry_run)
    files.enter()
    cases = [Case("", pixels, bus_gbps=gbps) for pixels in (1024, 512) for gbps in (0.0, 25.0, 12.0)]
    rows = []
    with torch.inference_mode():
        remembered, nbytes = load_remembered(files.nf4())
        patchers = {"streamed": load(files.nf4()), "remembered": remembered}
        for case in [Case("", 64, text_tokens=8)] if given.dry_run else cases:
            rows.append(measure(patchers, case, given.rounds, given.calls))
            (given.output / "modulation.json").write_text(json.dumps({"modulation_bytes": nbytes, "rows": rows}))
    print(f"{nbytes / 1e9:.2f} GB of modulation weights\n| picture | bus GB/s | streamed ms | remembered ms | ratio |")
    print("|---|---|---|---|---|")
    for row in rows:
        ratio = row["remembered_ms"] / row["streamed_ms"]
        bus = f"{row['bus_gbps']:.1f}" if row["bus_gbps"] else "as it is"
        print(f"| {row['pixels']} | {bus} | {row['streamed_ms']:.1f} | {row['remembered_ms']:.1f} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
