"""What the reports of `flashmoe bench ...` have in common."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe.cli import options

if TYPE_CHECKING:
    from rich.console import Console


def add_bundle(parser: argparse.ArgumentParser) -> None:
    """BUNDLE, None when not given."""
    parser.add_argument("bundle", nargs="?", type=Path, metavar="BUNDLE", help="default: the demo model")


def add_repeats(parser: argparse.ArgumentParser, default: int = 3, what: str = "") -> None:
    """--repeats, --results and --json; what: the repeats are called."""
    text = f"{what} (default {default})" if what else f"default: {default}"
    parser.add_argument("--repeats", type=options.count, default=default, metavar="N", help=text)
    add_output(parser)


def add_output(parser: argparse.ArgumentParser) -> None:
    """--results and --json."""
    parser.add_argument("--results", type=Path, metavar="FILE.jsonl", help="append the report to this file")
    options.add_json(parser)


def note(text: str) -> None:
    """Say on a terminal's status line what is being done; an empty text clears it."""
    if sys.stderr.isatty():
        print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)


def begin(bundle: Path | str, chosen: dict[str, Any], threads: int | None = None) -> dict[str, Any]:
    """A report's head: when, which model, which machine, and the options that matter.

    bundle: a path, of which the last name is told, or what else the model is called; threads: None for one a processor.
    """
    from datetime import UTC, datetime

    from flashmoe.bench.machine import describe_machine
    from flashmoe.env import cpu_count
    from flashmoe.kernels.cpu import choose_isa

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": bundle.name if isinstance(bundle, Path) else bundle,
        "machine": describe_machine(choose_isa()[0], threads or cpu_count()),
        "options": chosen,
    }


def finish(args: argparse.Namespace, report: dict[str, Any], show: Callable[[dict[str, Any]], None]) -> None:
    """Append the report to --results, and print it as --json or have it shown."""
    note("")
    if args.results:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        with args.results.open("a") as file:
            file.write(json.dumps(report, default=str) + "\n")
    if args.json:
        options.print_json(report)
    else:
        show(report)


def console(width: int = 120) -> Console:
    """So many columns where nobody watches."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else width)
