"""What the environment and the operating system say: variables, memory, cgroup limits.

The only module that reads environment variables on the Python side (the native core reads FLASHMOE_CPU).
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path


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


def user_cache_dir() -> Path:
    """Where a user's programs keep what they can do without: XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


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
