"""--memory is a ceiling: on the process, on the page cache that its files take, and on a control group."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import mmap
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe import env
from flashmoe.engine.engine import Engine, EngineOptions
from flashmoe.engine.memory import Demand, MemoryPlan, make_plan
from flashmoe.errors import BudgetError

MIB = 1 << 20
LONG = 32768
# 110 tokens: seven prefill chunks at the smallest budget, one at others.
PROMPT = "Once upon a time a brave mouse went to the market and bought some bread and cheese. " * 6
# The kernel counts pages per processor and sums them up now and then: two readings of a peak differ by this much.
COUNTING_NBYTES = 1 << 20
# The command, with the kernel's own peak of the whole process as the last line of stderr.
MEASURED = """
import atexit, re, sys
atexit.register(lambda: print(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1], file=sys.stderr))
from flashmoe.cli import main
sys.exit(main())
"""
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc")


class Done(NamedTuple):
    """A finished command; peak is its largest resident set in bytes."""

    code: int
    out: str
    error: str
    peak: int

    @property
    def stats(self) -> dict[str, Any]:
        assert self.code == 0, self.error
        stats: dict[str, Any] = json.loads(self.out)["stats"]
        return stats


def run(bundle: Path, *options: str, group: Path | None = None) -> Done:
    """`flashmoe run --json` in a process of its own, in a control group if one is given."""
    words = [
        "run",
        str(bundle),
        PROMPT,
        "--raw",
        "--json",
        "--max-tokens",
        "12",
        "--temperature",
        "0",
        *options,
    ]
    command = [sys.executable, "-c", MEASURED, *words]
    if group is not None:  # the shell enters the group and becomes the command
        command = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(group), *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    *errors, peak = done.stderr.splitlines() or ["0"]
    return Done(done.returncode, done.stdout, "\n".join(errors), int(peak) * 1024 if peak.isdigit() else 0)


@functools.cache
def smallest(bundle: Path, *options: str) -> int:
    """MiB of the smallest budget, as the refusal of a smaller one names it."""
    refused = run(bundle, "--memory", "1MiB", *options)
    assert (refused.code, refused.out) == (1, "")
    named = re.fullmatch(
        r"flashmoe: error: a memory budget of 1\.0 MiB is too small: "
        r"the smallest that works is --memory (\d+)MiB \(at --context \d+; a shorter context needs less\)",
        refused.error,
    )
    assert named is not None, refused.error
    return int(named[1])


@pytest.fixture(scope="module")
def bundle(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the demo bundle that nobody else reads, for a model of 32,768 positions; nothing of it is cached."""
    folder = tmp_path_factory.mktemp("budget") / "demo"
    shutil.copytree(demo_bundle, folder)
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": LONG}
    data = json.dumps(config).encode()
    (folder / "config.json").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["config.json"] = {"nbytes": len(data), "xxh3": xxhash.xxh3_64_hexdigest(data)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def drop_cached(folder: Path) -> None:
    """Write back and forget the pages of all files of a folder."""
    for file in filter(Path.is_file, folder.rglob("*")):
        fd = os.open(file, os.O_RDWR)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def cached_nbytes(folder: Path) -> int:
    """Bytes of a folder's files in the page cache, by mincore(2)."""
    libc, page, total = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE, 0
    for file in filter(Path.is_file, folder.rglob("*")):
        nbytes = file.stat().st_size
        present = (ctypes.c_ubyte * -(-nbytes // page))()
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), nbytes, prot=mmap.PROT_READ) as mapping:
            view = np.frombuffer(mapping, np.uint8)
            failed = libc.mincore(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(nbytes), present)
            del view
        if failed:
            pytest.skip(f"mincore: {os.strerror(ctypes.get_errno())}")
        total += page * sum(flag & 1 for flag in present)
    return total


@linux
@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("io", ["auto", "buffered"])
def test_process_and_page_cache_stay_within_the_budget(bundle: Path, factor: int, io: str) -> None:
    budget = factor * smallest(bundle, "--context", "1024") * MIB
    drop_cached(bundle)
    if cached_nbytes(bundle):
        pytest.skip("this file system keeps its files in memory")
    done = run(bundle, "--context", "1024", "--memory", str(budget), "--io", io)
    stats = done.stats
    assert stats["budget_bytes"] == budget
    assert abs(stats["peak_memory_bytes"] - done.peak) <= COUNTING_NBYTES
    assert done.peak + cached_nbytes(bundle) <= budget
    if factor == 1:
        assert stats["hit_rate"] < 0.5  # it did run with few slots


@linux
def test_the_reported_peak_is_that_of_the_process_alone(bundle: Path) -> None:
    ballast = np.ones(400 * MIB, np.uint8)  # a child's ru_maxrss would begin with it
    done = run(bundle, "--context", "1024")
    assert ballast[-1] == 1
    assert abs(done.stats["peak_memory_bytes"] - done.peak) <= COUNTING_NBYTES
    assert done.peak < ballast.nbytes


@linux
def test_a_budget_below_the_smallest_is_refused(bundle: Path) -> None:
    # The named one works: every test here runs with it.  4 MiB of it are slack, so 8 MiB less cannot.
    named = smallest(bundle, "--context", "1024")
    refused = run(bundle, "--context", "1024", "--memory", f"{named - 8}MiB")
    assert refused.code == 1
    assert re.search(r"the smallest that works is --memory \d+MiB", refused.error)


@given(
    budget=st.integers(1, 4 << 30),
    process=st.integers(1, 300 * MIB),
    resident=st.integers(1, 1 << 30),
    token=st.integers(1, 100_000),
    record=st.integers(1, 2000).map(lambda blocks: blocks * 4096),
    context=st.integers(1, 40_000),
    chunk=st.none() | st.integers(1, 3000),
)
@settings(deadline=None)
def test_a_plan_fits_or_the_smallest_that_does_is_named(
    budget: int, process: int, resident: int, token: int, record: int, context: int, chunk: int | None
) -> None:
    def plan(nbytes: int, context: int) -> MemoryPlan:
        demand = Demand(resident, token * context, lambda n: 100_000 + n * token, record, 240, 4, context)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(env, "current_memory", lambda: process)
            made = make_plan(demand, nbytes, chunk)
        parts = made.process_nbytes + made.resident_nbytes + made.state_nbytes + made.workspace_nbytes
        assert parts + made.slots_nbytes <= nbytes
        assert made.process_nbytes > process
        assert 4 <= made.slots <= 240
        return made

    try:
        made = plan(budget, context)
    except BudgetError as error:
        named = re.search(r"smallest that works is --memory (\d+)MiB", str(error))
        assert named is not None
        made = plan(int(named[1]) * MIB, context)
        assert made.slots < 240 or record < 8 * MIB // 240  # not needlessly large
    if chunk is not None:  # else a shorter chunk may pay for the context
        with contextlib.suppress(BudgetError):
            assert plan(made.budget_nbytes, 2 * context).slots <= made.slots


@linux
def test_the_longest_context_is_refused_or_fits(bundle: Path) -> None:
    options = ("--context", str(LONG))
    least = smallest(bundle, *options)
    assert least > smallest(bundle, "--context", "1024") + 100
    refused = run(bundle, *options, "--memory", f"{least - 8}MiB")
    assert refused.code == 1
    assert f"(at --context {LONG};" in refused.error
    assert 0 < run(bundle, *options, "--memory", f"{least}MiB").peak <= least * MIB


@pytest.mark.parametrize(
    ("activations", "kv_cache", "context"),
    [("int8", None, LONG), ("int8", "int8", LONG), ("f32", None, 2048)],
)
def test_what_is_allocated_is_what_was_planned(
    bundle: Path, activations: str, kv_cache: str | None, context: int
) -> None:
    chunk = 128
    options = EngineOptions(
        context=context, prefill_chunk=chunk, activations=activations, kv_cache=kv_cache, expert_slots=8
    )
    with Engine.open(bundle, options) as engine:
        engine.feed([5] * (2 * chunk), "last")
        parts, plan = engine._parts, engine.plan
        state = sum(array.nbytes for layer in parts.states[0].layers for array in vars(layer).values())
        inputs = sum(each.nbytes for each in parts.experts._inputs.values())
        scratch = parts.model._work.nbytes + parts.ops.scratch_nbytes + inputs
        # The planner adds the rotary tables to the state.
        assert plan.state_nbytes // 2 < state <= plan.state_nbytes
        assert plan.workspace_nbytes // 2 < scratch <= plan.workspace_nbytes
        assert parts.weights.data.nbytes <= plan.resident_nbytes + 4096
        assert parts.cache.stats().total.misses > 0


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A control group of our own below the one we are in; tests of it are skipped where we may not make one."""
    if not Path("/proc/self/cgroup").exists():
        pytest.skip("this system has no control groups")
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    parents = [
        (Path("/sys/fs/cgroup/memory") if controllers else Path("/sys/fs/cgroup")) / path.lstrip("/")
        for _, controllers, path in lines
        if not controllers or "memory" in controllers.split(",")
    ]
    reason = "no memory controller"
    for parent in parents:
        group = parent / f"flashmoe-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError as error:
            reason = f"{group}: {error.strerror}"
            continue
        try:
            if any((group / name).exists() for name in LIMITS):
                yield group
                return
        finally:
            group.rmdir()
    pytest.skip(f"control groups cannot be used: {reason}")


LIMITS = ("memory.limit_in_bytes", "memory.max")
PEAKS = ("memory.max_usage_in_bytes", "memory.peak")


def set_limit(group: Path, nbytes: int) -> None:
    file = next(group / name for name in LIMITS if (group / name).exists())
    file.write_text(str(nbytes))


def peak_usage(group: Path) -> int:
    """Most bytes that were charged to the group: memory of its processes, page cache and kernel memory."""
    files = [group / name for name in PEAKS if (group / name).exists()]
    if not files:
        pytest.skip("this kernel does not tell a group's peak")
    return int(files[0].read_text())


@linux
@pytest.mark.parametrize("io", ["auto", "buffered"])
def test_a_control_group_of_the_budgets_size_is_enough(bundle: Path, memory_group: Path, io: str) -> None:
    budget = smallest(bundle, "--context", "1024") * MIB
    drop_cached(bundle)
    set_limit(memory_group, budget)
    done = run(bundle, "--context", "1024", "--memory", str(budget), "--io", io, group=memory_group)
    assert done.code == 0, "killed by the kernel" if done.code == -9 else done.error
    assert 0 < done.peak <= budget
    assert 0 < peak_usage(memory_group) <= budget


@linux
def test_without_a_budget_the_control_group_decides(bundle: Path, memory_group: Path) -> None:
    least = smallest(bundle, "--context", "1024") * MIB
    set_limit(memory_group, least * 3 // 2)  # all but a small reserve is used
    done = run(bundle, "--context", "1024", group=memory_group)
    assert least <= done.stats["budget_bytes"] < least * 3 // 2
    assert done.peak <= done.stats["budget_bytes"]
    set_limit(memory_group, least)
    refused = run(bundle, "--context", "1024", group=memory_group)
    assert refused.code == 1
    assert "the smallest that works is --memory" in refused.error
