"""Which machine and which code a result belongs to."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flashmoe
from flashmoe import env


def describe_machine(isa: str, threads: int) -> dict[str, Any]:
    """Processor, memory, system, versions; JSON values."""
    return {
        "processor": _processor(),
        "cores": env.cpu_count(),
        "threads": threads,
        "isa": isa,
        "memory_bytes": env.memory_total(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "flashmoe": version("flashmoe"),
        "commit": _commit(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The checkout's commit, with a + when files differ from it; None when this is no checkout."""
    root = Path(flashmoe.__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=9"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
