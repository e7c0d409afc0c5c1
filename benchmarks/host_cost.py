"""What streaming costs the host: microseconds a block for waiting, binding and enqueuing, without the copies.

    python benchmarks/host_cost.py

A model of Flux's structure (19 double blocks with 10 layers, 38 single ones with 3) with tiny layers runs on the CPU,
streamed through copies that do nothing; the same model without streaming is subtracted. Medians; no GPU, no ComfyUI.
"""

import argparse
import statistics
import time
from typing import Any

import needs_torch  # noqa: F401
import orderly
import torch
from arguments import positive
from torch import nn

LAYERS = {"double": (19, 10), "single": (38, 3)}


class Block(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            layer(x)
        return x


def forward_us(blocks: list[nn.Module], repeats: int) -> float:
    x = torch.zeros(1, 128)
    times = []
    with torch.inference_mode():
        for _ in range(repeats):
            started = time.thread_time()
            for block in blocks:
                block(x)
            times.append(1e6 * (time.thread_time() - started))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=positive, default=50, help="forwards that the median (50 by default) is of")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    from flux_nf4.offload import copies, plan, streamer

    class NoCopies(copies.InlineCopies):
        def copy(self, pairs: Any, **events: Any) -> None:
            pass

    groups = {kind: [Block(layers) for _ in range(count)] for kind, (count, layers) in LAYERS.items()}
    blocks: list[nn.Module] = [block for group in groups.values() for block in group]
    plain = forward_us(blocks, repeats)
    streaming = streamer.Streamer(groups)
    streaming.start(plan.plan_for(streaming.sizes(), (), staging_bytes=20 * 65536), NoCopies(torch.device("cpu")))
    forward_us(blocks, 2)
    streamed = forward_us(blocks, repeats)
    tiles = sum(count * layers for count, layers in LAYERS.values())
    cost = streamed - plain
    print(f"{cost / len(blocks):.1f} us a block, {cost / tiles:.2f} us a tile, {cost / 1000:.2f} ms a forward")


if __name__ == "__main__":
    orderly.run(main)
