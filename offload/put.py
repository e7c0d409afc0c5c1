"""Put on the device what stays there: resident blocks, small parts, small extras."""

from collections.abc import Sequence

import torch

from .block import Block, HostRecord, MappedRecord
from .copies import Copies
from .pinning_ahead import until_registered


def put_missing(block: Block, copies: Copies) -> None:
    """Copy to the device the part of ``block`` that stays there, if it is missing: all, or the small part."""
    for record in block.records:
        if record.buffer is None:
            put(record, block.is_resident, copies)


def put(record: HostRecord | MappedRecord, resident: bool, copies: Copies) -> None:
    """Bring ``record`` to the device, before any compute that is launched after this."""
    sources = record.sources_for(resident)
    if not sources:
        return
    buffer = left = copies.empty(sum(nbytes for nbytes, _ in sources))
    pairs = []
    for nbytes, source in sources:
        pairs.append((left[: source.nbytes], source))
        left = left[nbytes:]
    write(pairs, copies)
    record.take(buffer, resident)


def write(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], copies: Copies) -> None:
    """Copy ``pairs`` after the compute launched so far, which may read the destinations, and before what follows."""
    until_registered(source for _, source in pairs)
    free, ready = copies.event(), copies.event()
    copies.record(free)
    copies.copy(pairs, after=free, done=ready)
    copies.compute_waits(ready)
