"""Measure the first tokens after a start with and without the uses of experts that an earlier run left."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

from flashmoe.cli import options
from flashmoe.cli.demo import find_demo_bundle
from flashmoe.errors import FlashmoeError
from flashmoe.types import format_size


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `flashmoe bench warm-start`."""
    parser.add_argument("bundle", nargs="?", type=Path, metavar="BUNDLE", help="default: the demo model")
    options.add_memory(parser)
    parser.add_argument("--tokens", type=options.count, default=16, metavar="N", help="measured (default 16)")
    parser.add_argument(
        "--teach",
        type=options.count,
        default=128,
        metavar="N",
        help="tokens of the earlier run (default 128)",
    )
    parser.add_argument(
        "--idle",
        type=options.real,
        default=3.0,
        metavar="SECONDS",
        help="between the start and the first token, cold or warm (default 3)",
    )
    parser.add_argument("--repeats", type=options.count, default=3, metavar="N", help="default: 3")
    parser.add_argument("--results", type=Path, metavar="FILE.jsonl", help="append the report to this file")
    options.add_json(parser)


def execute(args: argparse.Namespace) -> int:
    """Measure in alternation and report."""
    from datetime import UTC, datetime

    from flashmoe.bench.machine import describe_machine
    from flashmoe.bench.warm_start import WarmStartOptions, compare
    from flashmoe.env import cpu_count
    from flashmoe.kernels.cpu import choose_isa

    bundle = args.bundle or find_demo_bundle()
    wanted = WarmStartOptions(str(bundle), args.memory, args.tokens, args.idle)
    runs = compare(wanted, args.teach, args.repeats, _note)
    if sys.stderr.isatty():
        print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
    if len({run["logits_xxh3"] for run in runs}) != 1:
        raise FlashmoeError(f"{bundle}: two starts gave different logits: report this as a bug")
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": Path(bundle).name,
        "machine": describe_machine(choose_isa()[0], cpu_count()),
        "options": {"tokens": args.tokens, "teach": args.teach, "idle_seconds": args.idle},
        "runs": runs,
    }
    if args.results:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        with args.results.open("a") as file:
            file.write(json.dumps(report) + "\n")
    if args.json:
        options.print_json(report)
    else:
        _show(report)
    return 0


def _note(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    wanted = report["options"]
    title = f"{report['model']}: the first {wanted['tokens']} tokens, {wanted['idle_seconds']:g} s after the start"
    table = Table("", "tok/s", "of each run", "hits", "MB/token", "slots filled before", "peak", title=title)
    for kind in ("cold", "warm"):
        runs = [run for run in report["runs"] if run["start"] == kind]
        first = runs[0]
        table.add_row(
            kind,
            f"{median(run['tok_s'] for run in runs):.3g}",
            ", ".join(f"{run['tok_s']:.3g}" for run in runs),
            f"{first['hit_rate']:.0%}",
            f"{first['missed_bytes_per_token'] / 1e6:.4g}",
            f"{first['filled_slots']} of {first['slots']}",
            format_size(max(run["peak_memory_bytes"] for run in runs)),
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print("all starts gave the same logits")
