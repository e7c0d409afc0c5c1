"""How much RAM this process may use, and how much of it is free: the machine's, or its container's if that is less."""

from collections.abc import Iterator
from pathlib import Path

import psutil

_GROUP_OF_THIS_PROCESS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")
"""Linux's control groups, version 2: https://docs.kernel.org/admin-guide/cgroup-v2.html#memory"""


def ram_bytes() -> int:
    """All RAM that this process may use."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _limited_groups())])


def free_ram_bytes() -> int:
    """RAM that this process may still fill. What the system caches of files counts as free."""
    return min([psutil.virtual_memory().available, *(max(0, limit - used) for limit, used in _limited_groups())])


def _limited_groups() -> Iterator[tuple[int, int]]:
    """Limit and use, in bytes, of each control group of this process that has a limit.

    Inside a container often only its own groups are visible. Then the root is the container's, and the path that leads
    to it does not exist.
    """
    try:
        lines = _GROUP_OF_THIS_PROCESS.read_text().splitlines()
    except OSError:
        return
    path = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    for group in (_GROUPS / path, *(_GROUPS / parent for parent in Path(path).parents)):
        try:
            limit, current = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except OSError:
            continue
        if limit != "max":
            of_files = sum(int(statistics.get(name, 0)) for name in ("active_file", "inactive_file"))
            yield int(limit), int(current) - of_files
