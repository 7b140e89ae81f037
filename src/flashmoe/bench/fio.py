"""fio as the yardstick of a drive: random reads of whole records, past the page cache, by its engines.

It is given huge pages, as our slots have them: reads of 1.7 MiB into pages of 4 KiB came at 1.4 instead of 4 GB/s on a
virtual drive, whoever read (docs/decisions/007-reader.md).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flashmoe.errors import ConfigError

# Its way to have N reads in flight: N threads in pread(2), or one thread and a queue of N.
ENGINES = ("psync", "libaio", "io_uring")
_SAMPLE_SECONDS = 0.002
_START_NBYTES = 1 << 20  # above what reading its own program and libraries may take
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
        """Bytes per second with `queue_depth` reads in flight.  Raises ConfigError when fio fails.

        The smaller of fio's own number and of its bytes over the time in which it was seen reading: each of its
        threads runs for `seconds` by a clock of its own, and 32 that began 0.1 s apart claimed 4.25 of 3.85 GB/s.
        """
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
        output, error, code, active = _watched(command, seconds + _SPARE_SECONDS, engine)
        if code != 0:
            reason = (error or output).strip().splitlines()[:1] or ["no message"]
            raise ConfigError(f"fio with {engine} failed: {reason[0]}")
        nbytes, rate = _results(output, engine)
        return min(rate, nbytes / active) if active else rate


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


def _watched(command: list[str], timeout: float, engine: str) -> tuple[str, str, int, float]:
    """(stdout, stderr, exit code, seconds between its first and its last read, 0.0 where nobody can tell)."""
    try:
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            with subprocess.Popen(command, stdout=out, stderr=err, env=os.environ | _HUGE_PAGES) as process:
                active = _active_seconds(process, time.perf_counter() + timeout)
            out.seek(0)
            err.seek(0)
            return out.read(), err.read(), process.returncode, active
    except OSError as error:
        raise ConfigError(f"fio with {engine}: {error}") from error
    except subprocess.TimeoutExpired:
        raise ConfigError(f"fio with {engine} has not ended in {timeout:.0f} s: try fewer --depths") from None


def _active_seconds(process: subprocess.Popen[bytes], deadline: float) -> float:
    """Waits for the end of `process`; from just before it began to read until it has begun its last read."""
    counter = Path(f"/proc/{process.pid}/io")
    began = ended = 0.0
    seen = 0
    while process.poll() is None:
        now, nbytes = time.perf_counter(), _read_bytes(counter)
        if now > deadline:
            process.kill()
            raise subprocess.TimeoutExpired(process.args, 0.0)
        if nbytes > max(seen, _START_NBYTES):
            seen, ended = nbytes, now
        elif not seen:
            began = now
        time.sleep(_SAMPLE_SECONDS)
    return ended - began if seen else 0.0


def _read_bytes(counter: Path) -> int:
    """What a process has read from drives so far, 0 when it is gone or the system does not count."""
    try:
        fields = dict(line.split(": ") for line in counter.read_text().splitlines())
        return int(fields["read_bytes"])
    except (OSError, ValueError, KeyError):
        return 0


def _results(output: str, engine: str) -> tuple[int, float]:
    """(bytes, bytes per second) of its JSON, which warnings may precede."""
    try:
        reads = [job["read"] for job in json.loads(output[output.index("{") :])["jobs"]]
        return sum(int(read["io_bytes"]) for read in reads), float(sum(read["bw_bytes"] for read in reads))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"fio with {engine}: cannot read its results ({error!r})") from error
