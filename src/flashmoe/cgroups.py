"""How much memory this process may still take: physical memory and every control group above it (Linux).

A control group's limit is shared by all that run in it and below it, so what counts at each level is its limit less
what is in use there, more the file cache that the kernel would give up.  Field names and semantics:
Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst of the kernel.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as a number near 2^63
_DIGITS = 20  # of 2^64
# Kept free for the rest of the machine: a tenth of it, for programs that start or grow while a model runs.  Less than
# 512 MiB would not start a browser's next tab; more than 4 GiB nobody misses.
_MACHINE_SHARE, _MACHINE_LEAST, _MACHINE_MOST = 10, 512 << 20, 4 << 30
# Kept free inside a control group, which is there for work such as ours: for page tables, sockets and other memory that
# the kernel charges to it beside the process.
_GROUP_SHARE, _GROUP_LEAST, _GROUP_MOST = 20, 16 << 20, 512 << 20


@dataclass(frozen=True)
class Limit:
    """One bound on memory, in bytes.  name: of the control group, or "the machine".

    used: what cannot be reclaimed of what everybody under this bound has taken, this process included.
    """

    name: str
    total: int
    used: int
    reserve: int

    @property
    def room(self) -> int:
        """What may still be taken, its reserve apart; below 0 when others have taken that already."""
        return self.total - self.used - self.reserve


def limits(root: Path = Path("/")) -> list[Limit]:
    """Every bound that the system tells of; [] where it tells of none.

    root: of the tree that holds proc and sys, for tests.  Files that are missing or damaged bound nothing.
    """
    found = [limit for folder, name, version in _groups(root) if (limit := _group(folder, name, version))]
    machine = _machine(root)
    return found if machine is None else [machine, *found]


def group_limit(root: Path = Path("/")) -> int | None:
    """The tightest limit of this process's control groups, or None."""
    ceilings = [_ceiling(folder, version) for folder, _, version in _groups(root)]
    return min((ceiling for ceiling in ceilings if ceiling is not None), default=None)


def own_memory(root: Path = Path("/")) -> int:
    """Bytes that this process has taken already and a budget of the whole process may count again.

    Only anonymous memory: pages of its files are in the file cache, which counts as reclaimable.
    """
    return _kilobytes(root / "proc/self/status", "RssAnon") or 0


def _machine(root: Path) -> Limit | None:
    meminfo = root / "proc/meminfo"
    total, available = _kilobytes(meminfo, "MemTotal"), _kilobytes(meminfo, "MemAvailable")
    if total is None or available is None:
        return None
    reserve = min(max(total // _MACHINE_SHARE, _MACHINE_LEAST), _MACHINE_MOST)
    return Limit("the machine", total, total - available, reserve)


def _group(folder: Path, name: str, version: int) -> Limit | None:
    ceiling = _ceiling(folder, version)
    usage = _number(folder / ("memory.current" if version == 2 else "memory.usage_in_bytes"))
    if ceiling is None or usage is None:
        return None
    # v2 counts a group with all below it; v1 has both, and usage_in_bytes is of both.
    key = "inactive_file" if version == 2 else "total_inactive_file"
    reclaimable = min(_field(folder / "memory.stat", key) or 0, usage)
    reserve = min(max(ceiling // _GROUP_SHARE, _GROUP_LEAST), _GROUP_MOST)
    return Limit(name, ceiling, usage - reclaimable, reserve)


def _ceiling(folder: Path, version: int) -> int | None:
    """Of one group.  Beyond v2's memory.high a group is slowed down until it has given memory back: a limit too."""
    names = ("memory.max", "memory.high") if version == 2 else ("memory.limit_in_bytes",)
    numbers = [number for name in names if (number := _number(folder / name)) is not None]
    lowest = min(numbers, default=_UNLIMITED)
    return None if lowest >= _UNLIMITED else lowest


def _groups(root: Path) -> Iterator[tuple[Path, str, int]]:
    """(folder, name, version) of this process's memory groups, from its own up to the highest that can be seen."""
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        version = 1 if controllers else 2
        folder, base = _place(root, group, version)
        for level in (folder, *folder.parents):
            if not level.is_relative_to(base):
                break
            if version == 1 and level != folder and _number(level / "memory.use_hierarchy") == 0:
                break  # v1 without hierarchy: parents do not count their children
            yield level, f"control group /{'/'.join(level.relative_to(base).parts)}", version


def _place(root: Path, group: str, version: int) -> tuple[Path, Path]:
    """(the folder of a group, the mount point above it).

    In a container the mount often begins at the container's own group (mountinfo's fourth field) while
    /proc/self/cgroup names the path on the host; then what is mounted is ours.
    """
    kind, option = ("cgroup2", "") if version == 2 else ("cgroup", "memory")
    for line in _lines(root / "proc/self/mountinfo"):
        left, _, right = line.partition(" - ")
        fields, (system, _, options) = left.split(), [*right.split(), "", "", ""][:3]
        if system != kind or len(fields) < 5 or (option and option not in options.split(",")):
            continue
        mounted, point = _unescape(fields[3]), root / _unescape(fields[4]).lstrip("/")
        inside = Path(group)
        below = inside.relative_to(mounted) if inside.is_relative_to(mounted) else Path()
        folder = point / below
        return (folder if ".." not in below.parts and folder.is_dir() else point), point
    point = root / ("sys/fs/cgroup" if version == 2 else "sys/fs/cgroup/memory")
    folder = point / group.lstrip("/")
    return (folder if ".." not in Path(group).parts and folder.is_dir() else point), point


def _unescape(text: str) -> str:
    """mountinfo writes blanks and backslashes as three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:  # not mounted here, or not for us: it bounds nothing that we can see
        return []


def _number(path: Path) -> int | None:
    return _digits("".join(_lines(path)).strip())


def _field(path: Path, name: str) -> int | None:
    """A number of a file of "name number" lines."""
    for line in _lines(path):
        words = line.split()
        if len(words) > 1 and words[0] == name:
            return _digits(words[1])
    return None


def _kilobytes(path: Path, name: str) -> int | None:
    number = _field(path, f"{name}:")
    return None if number is None else number * 1024


def _digits(text: str) -> int | None:
    """A number as the kernel writes it; None for "max" and for what is none."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= _DIGITS else None
