"""Instructions of the hot kernels under callgrind, against the recorded budget.

    instruction_budget.py PROGRAM COMPILER          check; exit 1 when a kernel needs more than it may
    instruction_budget.py PROGRAM COMPILER --record write native/bench/budget.json anew

Counts repeat for one compiler, whatever else the machine does; seconds do not.  A kernel's count is the difference
between running it three times and once, halved: its inputs cancel.  Start-up is not collected: among its 1.8 million
instructions some hundred come and go, which made 5 % of the smallest kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

BUDGET = Path(__file__).parents[1] / "native" / "bench" / "budget.json"
ALLOWED = 0.03
# Another compiler's code differs by about a tenth without being better or worse.
ALLOWED_ELSEWHERE = 0.25
# glibc copies by `rep movsb` where the processor has ERMS, and callgrind counts each of its bytes: one 15 KB copy
# made 2.7 % of sample_top_k_top_p, more on one processor than on another.
SAME_LIBC_PATHS = {"GLIBC_TUNABLES": "glibc.cpu.hwcaps=-ERMS,-FSRM"}


def instructions(program: str, kernel: str, times: int) -> int:
    """Instructions inside `counted` (native/bench/instructions.cc); raises SystemExit when callgrind fails."""
    options = ["--tool=callgrind", "--callgrind-out-file=/dev/null", "--toggle-collect=counted"]
    command = ["valgrind", *options, program, kernel, str(times)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | SAME_LIBC_PATHS
    )
    found = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or not found or found.group(1) == "0":
        sys.exit(f"callgrind failed on {kernel}: {done.stderr.strip()}")
    return int(found.group(1))


def measure(program: str) -> dict[str, int]:
    """kernel -> instructions of one call."""
    names = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
    return {name: (instructions(program, name, 3) - instructions(program, name, 1)) // 2 for name in names}


def compiler_version(compiler: str) -> str:
    """First line of `compiler --version`; g++ begins it with the name it was called by, which says nothing."""
    shown = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    return re.sub(r"^\S*[cg]\+\+\S*", "GCC", shown.splitlines()[0])


def check(counts: dict[str, int], version: str) -> int:
    """Print the comparison; number of kernels above their budget."""
    budget = json.loads(BUDGET.read_text())
    allowed = ALLOWED if version == budget["compiler"] else ALLOWED_ELSEWHERE
    if version != budget["compiler"]:
        print(
            f"recorded with {budget['compiler']}, this is {version}: "
            f"{allowed:.0%} more is allowed instead of {ALLOWED:.0%}"
        )
    over = 0
    for name in sorted(counts | budget["instructions"]):
        now, before = counts.get(name), budget["instructions"].get(name)
        if now is None or before is None:
            print(f"{name:<22} {'is gone' if now is None else 'is new'}: make instruction-budget-record")
            over += 1
            continue
        change = now / before - 1
        remark = "TOO MANY" if change > allowed else "better: record it" if change < -allowed else ""
        over += change > allowed
        print(f"{name:<22}{now:>12,}{change:>+8.1%} {remark}".rstrip())
    return over


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program")
    parser.add_argument("compiler")
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    counts, version = measure(args.program), compiler_version(args.compiler)
    if args.record:
        BUDGET.write_text(json.dumps({"compiler": version, "instructions": counts}, indent=2) + "\n")
        print(BUDGET)
        return
    if over := check(counts, version):
        sys.exit(
            f"{over} kernels are over budget: make them cheaper, or record why with `make instruction-budget-record`"
        )


if __name__ == "__main__":
    main()
