"""Measure other ways to read experts against the engine's own: page cache, mmap, compression, prediction, queue depth.

Each experiment runs in alternation with the default, in processes of their own, on the same tokens, and must give the
same logits to the bit.  The page cache begins without the experts and the pool empty.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flashmoe.cli import bench_report, options
from flashmoe.cli.demo import find_demo_bundle
from flashmoe.types import format_size


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `flashmoe bench io-experiments`."""
    bench_report.add_bundle(parser)
    parser.add_argument(
        "--memory", type=options.size, metavar="SIZE", help="budget (default: a pool of 25 %% of the experts)"
    )
    parser.add_argument("--tokens", type=options.count, default=16, metavar="N", help="timed (default 16)")
    parser.add_argument(
        "--warm", type=options.whole, default=8, metavar="N", help="decoded before (default 8)"
    )
    bench_report.add_repeats(parser, 3, "pairs")
    parser.add_argument(
        "--only",
        type=_names,
        metavar="NAME,NAME",
        help="these experiments; a family like queue-depth is a name",
    )
    parser.add_argument("--list", action="store_true", help="name the experiments and run none")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="feed this text (default: random tokens, which repeat less)"
    )
    parser.add_argument(
        "--scratch",
        type=Path,
        metavar="DIR",
        help="on the bundle's drive, for compressed copies of up to 1.6 GB, removed afterwards (default: system's own)",
    )


def execute(args: argparse.Namespace) -> int:
    """Measure and report."""
    from flashmoe.bench.experiments.catalog import choose
    from flashmoe.bench.experiments.compare import CompareOptions, compare

    experiments = choose(args.only)
    if args.list:
        for experiment in experiments:
            print(f"{experiment.name:<20}{experiment.stands_for}")
        return 0
    bundle = args.bundle or find_demo_bundle()
    wanted = CompareOptions(
        bundle, args.memory, args.warm, args.tokens, args.repeats, args.text, args.scratch
    )
    measured = compare(wanted, experiments, bench_report.note)
    chosen = {name: getattr(args, name) for name in ("warm", "tokens", "repeats")}
    head = bench_report.begin(bundle, chosen)
    bench_report.finish(args, head | measured, _show)
    return 0


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _show(report: dict[str, Any]) -> None:
    from rich.table import Table

    pool = f"{report['slots']} of {report['experts']} experts in the pool"
    table = Table(
        title=f"{report['model']}, {pool}, {report['io']} reads, {report['options']['repeats']} pairs"
    )
    for name in (
        "",
        "stands for",
        "tok/s",
        "default",
        "ratio",
        "quartiles",
        "MB/token",
        "process",
        "page cache",
    ):
        table.add_column(name, justify="left" if name in ("", "stands for") else "right", no_wrap=not name)
    for row in report["results"]:
        ratio, cached = row["ratio"], row["page_cache_bytes"]
        table.add_row(
            row["name"],
            row["stands_for"],
            f"{row['tok_s']['median']:.3g}",
            f"{row['default_tok_s']['median']:.3g}",
            f"{ratio['median']:.2f}",
            f"{ratio['low']:.2f} - {ratio['high']:.2f}",
            f"{row['bytes_per_token'] / 1e6:.4g}",
            format_size(row["process_bytes"]),
            "?" if cached is None else format_size(cached),
        )
    console = bench_report.console(140)
    if report["results"]:
        console.print(table)
    for row in report["results"]:
        if row["note"]:
            console.print(f"{row['name']}: {row['note']}", markup=False, highlight=False)
    for one in report["skipped"]:
        console.print(f"skipped {one['name']}: {one['reason']}", markup=False, highlight=False)
    if report["results"]:
        console.print("all gave the same logits; the page cache is memory beyond the process and its budget")
