"""How fast this machine is, for limits on processor time that shall hold on a slower one, too."""

import json
import time

_THING = [
    {"name": f"double_blocks.{index}", "shape": [3072, index], "resident": index % 2 == 0} for index in range(400)
]
_SECONDS = 0.0008
"""What `_work` took at best on the machine that the limits were set on."""


def slowness() -> float:
    """How many times longer than there the same work takes here, 1 or more: what to multiply a limit with."""
    return max(1.0, min(_work() for _ in range(20)) / _SECONDS)


def _work() -> float:
    before = time.thread_time()
    json.loads(json.dumps(_THING))
    return time.thread_time() - before
