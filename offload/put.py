"""Put on the device what stays there: resident blocks, small parts, small extras."""

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
    buffer = copies.empty(sum(nbytes for nbytes, _ in sources))
    start = 0
    for nbytes, source in sources:
        write(buffer[start : start + source.nbytes], source, copies)
        start += nbytes
    record.take(buffer, resident)


def write(buffer: torch.Tensor, source: torch.Tensor, copies: Copies) -> None:
    """Copy ``source`` after the compute launched so far, which may read ``buffer``, and before what follows."""
    until_registered(source)
    free, ready = copies.event(), copies.event()
    copies.record(free)
    copies.copy([(buffer, source)], after=free, done=ready)
    copies.compute_waits(ready)
