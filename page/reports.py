"""Reports of running models: the last one of each node, the speeds that they have shown, and what to do next."""

import dataclasses
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..nodes_compute import Int8Figures
from ..offload.comfyui.streaming import StreamingReport
from ..offload.telemetry import limit_of
from .file_plan import Advice, Measured

_Picture = tuple[int, int]

_Run = tuple[str, Path, str | None, _Picture | None]
"""A device, a file, the node that ran it, and the size of its picture. None stands for the last of all nodes, or of all
sizes."""


@dataclass
class Reports:
    """What has been reported since the server started. The sampling thread adds, the server's thread reads."""

    _by_node: dict[str, tuple[StreamingReport, Int8Figures | None]] = field(default_factory=dict)
    _measured: dict[_Run, Measured] = field(default_factory=dict)

    def add(self, report: StreamingReport, device: str, file: Path | None, int8: Int8Figures | None) -> None:
        """Keep a report.

        Args:
            report: Of a running model.
            device: That it runs on.
            file: That it was loaded from; None if this package did not load it.
            int8: What int8 was measured to gain on the device; None if it was not measured there, or gains nothing.
        """
        if report.node_id is not None:
            self._by_node[report.node_id] = report, int8
        cost = report.cost
        if file is None or cost is None or not cost.total_ms or cost.stall_ms is None or not report.link_gbps:
            return
        compute_ms = (cost.total_ms - cost.stall_ms) / len(report.kinds)
        measured = Measured(report.link_gbps, compute_ms, report.pinned_bytes >= report.host_bytes, cost.picture)
        for node, picture in itertools.product((report.node_id, None), (cost.picture, None)):
            self._measured[device, file, node, picture] = measured

    def measured(self, device: str, file: Path, node: str | None, picture: _Picture | None = None) -> Measured | None:
        """What runs of ``file`` on ``device`` have shown: those of ``picture``'s size first, then those of ``node``."""
        runs = itertools.product((picture, None), (node, None))
        found = (self._measured.get((device, file, by, size)) for size, by in runs)
        return next((measured for measured in found if measured is not None), None)

    def as_json(self) -> dict[str, dict[str, Any]]:
        """The last report of each node, by its id."""
        return {name: report_as_json(*report) for name, report in self._by_node.copy().items()}


def report_as_json(report: StreamingReport, int8: Int8Figures | None) -> dict[str, Any]:
    """The report for the page, with advice for nodes that have no plan from a file."""
    advice = advise_next(report)
    more = {
        "is_lowered": report.is_lowered,
        "advice": advice and dataclasses.asdict(advice),
        "int8": int8 and dataclasses.asdict(int8),
    }
    return dataclasses.asdict(report) | more


def advise_next(report: StreamingReport) -> Advice | None:
    """What to do after this run; None where nothing was measured."""
    if report.resident is not None and not report.streamed:
        return Advice("all_resident")
    cost = report.cost
    if cost is None or not cost.total_ms or cost.stall_ms is None or not report.link_gbps:
        return None
    is_pinned = report.pinned_bytes >= report.host_bytes
    limit = limit_of(cost.stall_ms, cost.total_ms, report.link_gbps, is_pinned=is_pinned)
    figures = {"gbps": report.link_gbps, "percent": 100 * cost.stall_ms / cost.total_ms}
    return Advice("more_vram" if limit == "bus_is_limit" else limit, figures)
