"""The plan for counts alone."""

import math
from collections.abc import Mapping, Sequence

from flux_nf4.offload.plan import STAGING_BYTES, BlockSize, ResidencyPlan, plan_by_budget


def plan_by_counts(
    blocks: Sequence[BlockSize], resident: Mapping[str, int], staging_bytes: int = STAGING_BYTES
) -> ResidencyPlan:
    """Keep ``resident[kind]`` blocks of each kind, of kinds not named none, whatever room they take."""
    counts = tuple((kind, resident.get(kind, 0)) for kind in dict.fromkeys(block.kind for block in blocks))
    return plan_by_budget(tuple(blocks), math.inf, staging_bytes, counts)
