"""Decoding beside llama.cpp inside the same memory control group, in alternation, from a cold page cache.

    sudo .venv/bin/python tools/stream_beside_peer.py BUNDLE GGUF --completion .cache/peer/build/bin/llama-completion

Needs root: it makes a control group (v1 or v2), puts each engine in it and drops the page cache before each run.
docs/benchmarks.md says how llama-completion and a GGUF of the same shape are made.  llama.cpp maps its file and does
not repack it, which would copy the weights into memory that the limit does not have.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flashmoe.bench.machine import describe_machine
from flashmoe.env import cpu_count
from flashmoe.kernels.cpu import choose_isa
from flashmoe.types import parse_size

_EVAL = re.compile(r"(?<!prompt )eval time =\s*([\d.]+) ms /\s*(\d+) runs")
_ROOT = Path("/sys/fs/cgroup")


class Group:
    """A memory control group of version 1 or 2."""

    def __init__(self, limit: int) -> None:
        self._v2 = (_ROOT / "cgroup.controllers").exists()
        self.path = (_ROOT if self._v2 else _ROOT / "memory") / "flashmoe-bench"
        self.path.mkdir(exist_ok=True)
        self._write("memory.max" if self._v2 else "memory.limit_in_bytes", limit)
        if self._v2:
            self._write("memory.swap.max", 0)

    def run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """The command inside the group; its output is text."""
        if not self._v2:
            self._write("memory.max_usage_in_bytes", 0)
        return subprocess.run(
            command, capture_output=True, text=True, check=False, errors="replace", preexec_fn=self._enter
        )

    @property
    def peak(self) -> int:
        """Bytes: memory and page cache, at most so far (of version 1: since the last run began)."""
        return int((self.path / ("memory.peak" if self._v2 else "memory.max_usage_in_bytes")).read_text())

    def _enter(self) -> None:
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def _write(self, name: str, value: int) -> None:
        (self.path / name).write_text(str(value))


@contextmanager
def group(limit: int) -> Iterator[Group]:
    """A group with this limit, gone afterwards."""
    made = Group(limit)
    try:
        yield made
    finally:
        made.path.rmdir()


def drop_page_cache() -> None:
    """What earlier runs left of the files."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def run_flashmoe(inside: Group, bundle: Path, limit: int, tokens: int) -> dict[str, Any]:
    """One answer of `flashmoe run`."""
    command = [sys.executable, "-m", "flashmoe.cli", "run", str(bundle), "ab", "--raw", "--json"]
    command += [
        "--memory",
        str(limit),
        "--max-tokens",
        str(tokens),
        "--temperature",
        "0",
        "--usage-file",
        "off",
    ]
    done = inside.run(command)
    if done.returncode != 0:
        raise SystemExit(f"flashmoe: exit {done.returncode}: {done.stderr.strip()}")
    report = json.loads(done.stdout)
    stats = report["stats"]
    return {
        "engine": "flashmoe",
        "tok_s": stats["decode_tok_s"],
        "bound_tok_s": stats["bound_tok_s"],
        "tokens": len(report["token_ids"]),
        "process_peak": stats["peak_memory_bytes"],
    }


def run_peer(inside: Group, program: Path, model: Path, tokens: int) -> dict[str, Any]:
    """One answer of llama-completion."""
    command = [
        str(program),
        "-m",
        str(model),
        "-t",
        str(cpu_count()),
        "-c",
        "512",
        "-n",
        str(tokens),
        "-p",
        "ab",
    ]
    command += ["--no-repack", "-lm", "mmap", "--no-warmup", "--no-conversation", "--ignore-eos"]
    done = inside.run(command)
    found = _EVAL.search(done.stdout + done.stderr)
    if done.returncode != 0 or found is None:
        raise SystemExit(f"llama.cpp: exit {done.returncode}: {done.stderr.strip()[-500:]}")
    return {"engine": "llama.cpp", "tok_s": 1000 * int(found[2]) / float(found[1]), "tokens": int(found[2])}


def main() -> None:
    """Alternate, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--completion", type=Path, required=True, help="llama-completion")
    parser.add_argument("--limit", type=parse_size, default=6 << 30, help="of the group, and --memory (6GiB)")
    parser.add_argument("--tokens", type=int, default=48, help="of flashmoe (default 48)")
    parser.add_argument("--peer-tokens", type=int, default=12, help="of llama.cpp (default 12)")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--results", type=Path, help="append the report to this file")
    args = parser.parse_args()
    runs = []
    with group(args.limit) as inside:
        for _ in range(args.repeats):
            for engine in ("flashmoe", "llama.cpp"):
                drop_page_cache()
                if engine == "flashmoe":
                    run = run_flashmoe(inside, args.bundle, args.limit, args.tokens)
                else:
                    run = run_peer(inside, args.completion, args.gguf, args.peer_tokens)
                runs.append(run | {"group_peak": inside.peak})
                print(json.dumps(runs[-1]), flush=True)
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": args.bundle.name,
        "peer": args.gguf.name,
        "machine": describe_machine(choose_isa()[0], cpu_count()),
        "limit": args.limit,
        "runs": runs,
    }
    if args.results:
        with args.results.open("a") as file:
            file.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
