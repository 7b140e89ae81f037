"""fio as the yardstick of a drive: random reads of whole records, past the page cache, by its engines.

It is given huge pages, as our slots have them: reads of 1.7 MiB into pages of 4 KiB came at 1.4 instead of 4 GB/s on a
virtual drive, whoever read (docs/decisions/007-reader.md).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flashmoe.errors import ConfigError

# Its way to have N reads in flight: N threads in pread(2), or one thread and a queue of N.
ENGINES = ("psync", "libaio", "io_uring")
_SPARE_SECONDS = 60  # beyond the measurement: start, and a drive that hangs
_ALWAYS = (
    "--rw=randread",
    "--direct=1",
    "--readonly",
    "--norandommap",
    "--randrepeat=0",
    "--file_service_type=random",
    "--time_based",
    "--thread",
    "--invalidate=0",
    "--group_reporting",
    "--output-format=json",
)
_HUGE_PAGE = 2 << 20
# The C library asks for huge pages (glibc 2.35; others ignore it).  fio itself asks only for reserved ones.
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@dataclass(frozen=True)
class Fio:
    """An installed fio."""

    program: str
    version: str

    def read(
        self, engine: str, queue_depth: int, files: Sequence[Path], record_nbytes: int, seconds: float
    ) -> float:
        """Bytes per second with `queue_depth` reads in flight.  Raises ConfigError when fio fails."""
        depth = "numjobs" if engine == "psync" else "iodepth"
        command = [
            self.program,
            "--name=records",
            f"--ioengine={engine}",
            f"--{depth}={queue_depth}",
            f"--filename={':'.join(_escaped(file) for file in files)}",
            # Only the first and the last 2 MiB of its memory may be small pages: one thread's buffer begins behind the
            # first, and the size of a write, of which there are none, makes it end before the last.
            f"--bs={record_nbytes},{record_nbytes + 2 * _HUGE_PAGE}",
            f"--iomem_align={_HUGE_PAGE}",
            f"--runtime={round(seconds * 1000)}ms",
            *_ALWAYS,
        ]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                check=False,
                timeout=seconds + _SPARE_SECONDS,
                env=os.environ | _HUGE_PAGES,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConfigError(f"fio with {engine}: {error}") from error
        if done.returncode != 0:
            reason = (done.stderr or done.stdout).strip().splitlines()[:1] or ["no message"]
            raise ConfigError(f"fio with {engine} failed: {reason[0]}")
        return _bytes_per_second(done.stdout, engine)


def find_fio() -> tuple[Fio | None, str]:
    """The fio on PATH, or None and why there is none."""
    program = shutil.which("fio")
    if program is None:
        return None, "fio is not installed (Debian: apt install fio): nothing to compare with"
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    except OSError as error:
        return None, f"{program} cannot be run ({error.strerror}): nothing to compare with"
    version = done.stdout.strip()
    if not version.startswith("fio-"):  # other packages have a command of this name
        return None, f"{program} is another program of this name: nothing to compare with"
    return Fio(program, version), ""


def _escaped(file: Path) -> str:
    """Colons separate fio's files."""
    return str(file.absolute()).replace("\\", "\\\\").replace(":", "\\:")


def _bytes_per_second(output: str, engine: str) -> float:
    """Of its JSON, which warnings may precede."""
    try:
        report = json.loads(output[output.index("{") :])
        return float(sum(job["read"]["bw_bytes"] for job in report["jobs"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"fio with {engine}: cannot read its results ({error!r})") from error
