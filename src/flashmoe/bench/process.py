"""A measurement in a process of its own: its peak memory and its caches are then its own too."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from flashmoe.errors import FlashmoeError

_PREFIX = "flashmoe: error: "


def run_module(module: str, options: dict[str, Any]) -> dict[str, Any]:
    """Run `module` in a fresh interpreter: JSON options in, one JSON object out.

    Raises FlashmoeError with the one line that the process ended with.
    """
    command = [sys.executable, "-m", module, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise FlashmoeError(lines[-1].removeprefix(_PREFIX))
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def serve(measure: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The other side: measure what the command line asks for.  A user error is one line and exit code 1."""
    try:
        sys.stdout.write(json.dumps(measure(json.loads(sys.argv[1]))))
    except FlashmoeError as error:
        sys.stderr.write(f"{_PREFIX}{error}\n")
        raise SystemExit(1) from None
