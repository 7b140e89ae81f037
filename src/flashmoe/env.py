"""What the environment and the operating system say: variables, memory, cgroup limits.

The only module that reads environment variables on the Python side (the native core reads FLASHMOE_CPU).
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

_UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as a number near 2^63


def cpu_count() -> int:
    """Processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def traceback_wanted() -> bool:
    """True when FLASHMOE_TRACEBACK asks for the whole traceback of user errors."""
    return os.environ.get("FLASHMOE_TRACEBACK", "") not in ("", "0")


def api_key() -> str | None:
    """The key that clients of the server must send: FLASHMOE_API_KEY."""
    return os.environ.get("FLASHMOE_API_KEY") or None


def memory_total() -> int:
    """Physical memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_available() -> int:
    """Bytes that can be taken without swapping (Linux MemAvailable; elsewhere three quarters of the total)."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return memory_total() * 3 // 4


def cgroup_memory_limit() -> int | None:
    """The tightest memory limit of this process's control groups (v1 or v2), or None."""
    limits = [limit for path in _cgroup_limit_files() if (limit := _read_limit(path)) is not None]
    return min(limits, default=None)


def current_memory() -> int:
    """Resident set of this process now, in bytes (its peak where the system does not tell)."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_memory()


def peak_memory() -> int:
    """Largest resident set of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the process that started this one: exec keeps its peak
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cgroup_limit_files() -> list[Path]:
    table = Path("/proc/self/cgroup")
    if not table.exists():
        return []
    files = []
    for line in table.read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            root, name = Path("/sys/fs/cgroup"), "memory.max"
        elif "memory" in controllers.split(","):
            root, name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        else:
            continue
        here = root / group.lstrip("/")
        files += [folder / name for folder in (here, *here.parents) if folder.is_relative_to(root)]
    return files


def _read_limit(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:  # the group is not mounted here (containers): it limits nothing we can see
        return None
    if not text.isdigit() or int(text) >= _UNLIMITED:
        return None
    return int(text)
