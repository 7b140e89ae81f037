"""Show what this machine offers: versions, instruction set, memory and its limits, huge pages, direct I/O."""

from __future__ import annotations

import argparse
import mmap
import os
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

from flashmoe import env
from flashmoe.cli import options
from flashmoe.errors import ConfigError
from flashmoe.types import format_size

_BLOCK = 4096  # the alignment that direct I/O asks for on every current drive
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `flashmoe doctor`."""
    parser.add_argument(
        "directory",
        nargs="?",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="where bundles are kept: its drive is examined (default: here)",
    )
    options.add_json(parser)


def execute(args: argparse.Namespace) -> int:
    """Examine and print."""
    if not args.directory.is_dir():
        raise ConfigError(f"{args.directory} is no directory: name the one that holds your bundles")
    report = examine(args.directory)
    if args.json:
        options.print_json(report)
    else:
        print(_describe(report))
    return 0


def examine(directory: Path) -> dict[str, Any]:
    """Everything that `flashmoe doctor` prints, as one object."""
    return {
        "versions": _versions(),
        "cpu": _cpu(),
        "memory": _memory(),
        "drive": _drive(directory),
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = {name: version(name) for name in ("flashmoe", "numpy", "tokenizers")}
    return {**packages, "python": platform.python_version(), "system": platform.platform()}


def _cpu() -> dict[str, Any]:
    from flashmoe.kernels.cpu import explain

    return {**explain(), "processors": env.cpu_count()}


def _memory() -> dict[str, Any]:
    from flashmoe import cgroups
    from flashmoe.engine.memory import auto_budget

    auto = auto_budget()
    return {
        "total_bytes": env.memory_total(),
        "available_bytes": env.memory_available(),
        "cgroup_limit_bytes": cgroups.group_limit(),
        "default_budget_bytes": auto.nbytes,
        "default_budget_reason": auto.reason,
        "transparent_huge_pages": _huge_pages(),
    }


def _huge_pages() -> str:
    """The kernel's setting ("always", "madvise", "never"), or why there is none."""
    if not _HUGE_PAGES.exists():
        return "not offered by this system"
    words = _HUGE_PAGES.read_text().split()
    return next((word.strip("[]") for word in words if word.startswith("[")), "unknown")


def _drive(directory: Path) -> dict[str, Any]:
    from flashmoe.store.reader import NativeReader

    direct, reason = probe_direct_io(directory)
    reader = NativeReader([])  # which engine it takes depends on the system, not on files
    engine, engine_reason = reader.engine, reader.engine_reason
    reader.close()
    return {
        "directory": str(directory.resolve()),
        "free_bytes": shutil.disk_usage(directory).free,
        "direct_io": direct,
        "reason": reason,
        "engine": engine,
        "engine_reason": engine_reason,
    }


def probe_direct_io(directory: Path) -> tuple[bool, str]:
    """(whether reads can bypass the page cache there, why), tried on a 4 KiB file that is deleted again."""
    flag: int | None = getattr(os, "O_DIRECT", None)
    if flag is None:
        return platform.system() == "Darwin", "F_NOCACHE" if platform.system() == "Darwin" else "no O_DIRECT"
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".flashmoe-probe-") as file:
            file.write(bytes(_BLOCK))
            file.flush()
            os.fsync(file.fileno())
            return _read_direct(Path(file.name), flag)
    except OSError as error:
        return False, f"cannot write a test file there ({error.strerror})"


def _read_direct(file: Path, flag: int) -> tuple[bool, str]:
    try:
        descriptor = os.open(file, os.O_RDONLY | flag)
    except OSError as error:
        return False, f"this file system refuses O_DIRECT ({error.strerror}): reads go through the page cache"
    try:
        with mmap.mmap(-1, _BLOCK) as block:  # a mapping is page-aligned, as O_DIRECT demands
            nread = os.preadv(descriptor, [block], 0)
    except OSError as error:
        return False, f"a direct read fails ({error.strerror}): reads go through the page cache"
    finally:
        os.close(descriptor)
    return nread == _BLOCK, "O_DIRECT"


def _describe(report: dict[str, Any]) -> str:
    cpu, memory, drive = report["cpu"], report["memory"], report["drive"]
    limit = memory["cgroup_limit_bytes"]
    rows = list(report["versions"].items())
    rows += [
        ("instruction set", f"{cpu['isa']}: {cpu['reason']}"),
        (
            "also supported",
            ", ".join(name for name in cpu["supported"] if name != cpu["isa"]) or "nothing else",
        ),
        ("processors", str(cpu["processors"])),
        (
            "memory",
            f"{format_size(memory['total_bytes'])}, {format_size(memory['available_bytes'])} available",
        ),
        ("control group", "no memory limit" if limit is None else f"at most {format_size(limit)}"),
        (
            "default budget",
            f"{format_size(memory['default_budget_bytes'])} ({memory['default_budget_reason']})",
        ),
        ("huge pages", memory["transparent_huge_pages"]),
        ("drive", f"{drive['directory']}, {format_size(drive['free_bytes'])} free"),
        ("reader", f"{drive['engine']}: {drive['engine_reason']}"),
        ("direct I/O", f"{'yes' if drive['direct_io'] else 'no'}: {drive['reason']}"),
    ]
    return "\n".join(f"{name:<16} {value}" for name, value in rows)
