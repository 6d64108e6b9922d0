"""How many cores this process may use, by its affinity mask and the CPU quotas of its cgroups."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# what version 2 and version 1 of cgroups call a quota and its period
_QUOTA_FILES = ("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")
# Both can change while a process runs. As every op asks, and reading takes 0.4 ms, a count is kept so long.
_SECONDS = 1.0
_count = 1
_is_valid_until = -math.inf


def num_cores() -> int:
    """Return how many cores this process may use; a part of a core counts as one."""
    global _count, _is_valid_until
    now = time.monotonic()
    if now >= _is_valid_until:
        mask = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        _count = max(1, math.ceil(min(len(mask), *_quotas())))
        _is_valid_until = now + _SECONDS
    return _count


def _quotas() -> Iterator[float]:
    """Yield the quotas in cores, or infinity, of the process's cgroups and of those that hold them."""
    yield math.inf
    try:
        groups = [line.split(":", 2) for line in _OWN_CGROUPS.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in groups:
        for mount in _mounts(controllers.split(",")):
            # a container that sees no cgroup above its own may be told of a path outside
            group = mount / path.strip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(mount):
                    yield _quota(folder)


def _mounts(controllers: list[str]) -> tuple[Path, ...]:
    """Return where cgroups with these controllers may be mounted; none are named in version 2."""
    if controllers == [""]:
        return _CGROUPS, _CGROUPS / "unified"
    return (_CGROUPS / "cpu",) if "cpu" in controllers else ()


def _quota(folder: Path) -> float:
    for names in _QUOTA_FILES:
        try:
            quota, period = " ".join((folder / name).read_text() for name in names).split()
            if quota not in ("max", "-1"):
                return int(quota) / int(period)
        except (OSError, ValueError):
            continue
    return math.inf
