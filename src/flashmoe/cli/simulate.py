"""Replay a recorded routing trace through replacement policies: how often would experts have been in memory?"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe.cli import bench_report, options

if TYPE_CHECKING:
    from flashmoe.bench.simulate import Plan


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `flashmoe simulate`."""
    parser.add_argument("trace", type=Path, metavar="TRACE.npz", help="of `flashmoe run --record-trace`")
    parser.add_argument(
        "--slots",
        type=options.numbers,
        required=True,
        metavar="N,N",
        help="experts in memory, for each layer; several sizes are replayed one after the other",
    )
    parser.add_argument(
        "--policy",
        action="append",
        default=[],
        metavar="NAME,NAME",
        help="policies to compare (default: all that need no training); also learned:FILE, static:FILE",
    )
    parser.add_argument(
        "--pool",
        choices=("layer", "shared"),
        default="layer",
        help="a pool for each layer, or one for all as in a run",
    )
    parser.add_argument("--cold", action="store_true", help="begin each sequence with an empty cache")
    parser.add_argument(
        "--part",
        choices=("all", "train", "test"),
        default="all",
        help="of each domain's sequences the first three of every five (train), or the others (test)",
    )
    parser.add_argument(
        "--drive", type=options.rate, metavar="GB/S", help="project tok/s for a drive of this speed"
    )
    parser.add_argument("--record", type=options.size, metavar="SIZE", help="bytes of an expert, for --drive")
    parser.add_argument(
        "--compute-ms",
        type=options.real,
        default=0.0,
        metavar="MS",
        help="computing a token takes, for --drive",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw hit rates by size, layer, domain")
    options.add_json(parser)


def execute(args: argparse.Namespace) -> int:
    """Replay and report."""
    from flashmoe.bench.simulate import Drive, Plan, simulate
    from flashmoe.bench.split import part_of
    from flashmoe.errors import ConfigError
    from flashmoe.store.policies.registry import SIMPLE
    from flashmoe.store.trace import read_trace

    if (args.drive is None) != (args.record is None):
        raise ConfigError(
            "--drive and --record belong together: give the bytes of an expert and the drive's GB/s"
        )
    if not args.slots or 0 in args.slots:
        raise ConfigError("--slots must be at least 1: give sizes like 16,32")
    names = [name for words in args.policy for name in words.split(",") if name] or list(SIMPLE)
    drive = None if args.drive is None else Drive(args.record, args.drive * 1e9, args.compute_ms / 1e3)
    trace = part_of(read_trace(args.trace).decoding(), args.part)
    plan = Plan(names, args.slots, args.pool, args.cold, drive)
    rows = simulate(trace, plan, _progress)
    _progress("", 0)
    report = {
        "trace": args.trace.name,
        "part": args.part,
        "tokens": trace.tokens,
        "sequences": len(trace.sequence_starts()),
        "layers": len(trace.layers),
        "experts": trace.experts,
        "experts_per_token": trace.per_token,
        "pool": args.pool,
        "cold": args.cold,
        "results": rows,
    }
    if args.plot:
        from flashmoe.bench.simulate_plot import plot_replays

        plot_replays(rows, _title(report), args.plot)
    if args.json:
        options.print_json(report)
    else:
        _show(report, plan)
    return 0


def _progress(policy: str, slots: int) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[2K{f'{policy}, {slots} slots' if policy else ''}", end="", file=sys.stderr, flush=True)


def _title(report: dict[str, Any]) -> str:
    start = "cold for each sequence" if report["cold"] else "going on"
    return (
        f"{report['trace']} ({report['part']}): {report['tokens']} tokens, {report['layers']} layers, "
        f"{report['experts_per_token']} of {report['experts']} experts, pool {report['pool']}, {start}"
    )


def _show(report: dict[str, Any], plan: Plan) -> None:
    from rich.table import Table

    table = Table(title=_title(report), title_justify="left")
    table.add_column("policy", no_wrap=True)
    for slots in plan.slots:
        table.add_column(f"{slots} slots", justify="right", no_wrap=True)
        table.add_column("gap", justify="right", no_wrap=True)
        if plan.drive is not None:
            table.add_column("MB/token", justify="right", no_wrap=True)
            table.add_column("tok/s", justify="right", no_wrap=True)
    cells: dict[str, list[str]] = {}
    for row in report["results"]:
        gap = row["gap_closed"]
        one = cells.setdefault(row["policy"], [])
        one += [f"{row['hit_rate']:.1%}", "" if gap is None else f"{gap:.0%}"]
        if plan.drive is not None:
            one += [f"{row['bytes_per_token'] / 1e6:.1f}", f"{row['projected_tok_s']:.2f}"]
    for name, texts in cells.items():
        table.add_row(name, *texts)
    console = bench_report.console(140)
    console.print(table)
    console.print("hit rate, and the part of the gap between lru and belady that is closed", style="dim")
