"""Measure the first tokens after a start with and without the uses of experts that an earlier run left."""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

from flashmoe.cli import bench_report, options
from flashmoe.cli.demo import find_demo_bundle
from flashmoe.errors import FlashmoeError
from flashmoe.types import format_size


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `flashmoe bench warm-start`."""
    bench_report.add_bundle(parser)
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
    bench_report.add_repeats(parser)


def execute(args: argparse.Namespace) -> int:
    """Measure in alternation and report."""
    from flashmoe.bench.warm_start import WarmStartOptions, compare

    bundle = args.bundle or find_demo_bundle()
    wanted = WarmStartOptions(str(bundle), args.memory, args.tokens, args.idle)
    runs = compare(wanted, args.teach, args.repeats, bench_report.note)
    if len({run["logits_xxh3"] for run in runs}) != 1:
        raise FlashmoeError(f"{bundle}: two starts gave different logits: report this as a bug")
    chosen = {"tokens": args.tokens, "teach": args.teach, "idle_seconds": args.idle}
    bench_report.finish(args, bench_report.begin(bundle, chosen) | {"runs": runs}, _show)
    return 0


def _show(report: dict[str, Any]) -> None:
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
    console = bench_report.console()
    console.print(table)
    console.print("all starts gave the same logits")
