"""How many cores this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def cores() -> int:
    """Cores that this process may use: its affinity, and its control group's share of time."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, quota(CGROUP))))


def quota(root: Path) -> float:
    """Cores that the control group at ``root`` may use, by either version's files; infinity where
    it says nothing.
    """
    for name, period in (("cpu.max", None), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = (root / name).read_text().split()
            if period:
                words += (root / period).read_text().split()
            share, length = float(words[0]), float(words[1])
        except (OSError, ValueError, IndexError):  # not there, or "max"
            continue
        if share > 0 and length > 0:
            return share / length
    return math.inf
