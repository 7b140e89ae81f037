"""Measure random reads of whole experts, by our reader and by fio on the same files in the same run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flashmoe.cli import bench_report, options
from flashmoe.cli.demo import find_demo_bundle
from flashmoe.types import format_size

_DEPTHS = [1, 2, 4, 8, 16, 32]
_MOST_IN_FLIGHT = 256  # the reader's own limit


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `flashmoe bench io`."""
    bench_report.add_bundle(parser)
    parser.add_argument(
        "--depths", type=_depths, default=_DEPTHS, metavar="N,N", help="reads in flight (default 1,2,4..32)"
    )
    parser.add_argument(
        "--seconds", type=options.rate, default=1.0, metavar="S", help="of a measurement (default 1)"
    )
    bench_report.add_repeats(parser, 7, "rounds")
    parser.add_argument(
        "--places",
        type=options.count,
        metavar="N",
        help="buffers that ours reads into in turn, like slots (default: as many as in flight, like fio)",
    )


def execute(args: argparse.Namespace) -> int:
    """Measure and report."""
    from flashmoe.bench.io import IoOptions, measure, record_files
    from flashmoe.bundle.reader import Bundle

    bundle = args.bundle or find_demo_bundle()
    wanted = IoOptions(args.depths, 0.4 * args.seconds, args.seconds, args.repeats, args.places)
    measured = measure(record_files(Bundle.open(bundle)), wanted, bench_report.note)
    chosen = {name: getattr(args, name) for name in ("depths", "seconds", "repeats", "places")}
    head = bench_report.begin(Path(bundle).resolve(), chosen)
    bench_report.finish(args, head | measured, _show)
    return 0


def _depths(text: str) -> list[int]:
    depths = [options.count(part.strip()) for part in text.split(",")]
    if max(depths) > _MOST_IN_FLIGHT:
        raise argparse.ArgumentTypeError(f"{max(depths)}: at most {_MOST_IN_FLIGHT} reads are in flight")
    return sorted(set(depths))


def _show(report: dict[str, Any]) -> None:

    console = bench_report.console()
    console.print(_sweep_table(report))
    console.print(_duel_table(report))
    print(
        f"reads are {report['io']}: {report['reason']}; engine {report['engine']}: {report['engine_reason']}"
    )
    if report["ratio"] is not None:
        print(
            f"{report['engine']} reads at {report['ratio']:.1%} of fio's best, "
            f"at the queue depth in use at {report['ratio_in_use']:.1%}"
        )
    for remark in report["remarks"]:
        print(remark)


def _sweep_table(report: dict[str, Any]) -> Any:
    from rich.table import Table

    size = f"{format_size(report['record_nbytes'])} of {format_size(report['nbytes'])}"
    table = Table(title=f"{report['model']}: random reads of {size}, GB/s by reads in flight")
    depths = report["options"]["depths"]
    for name in ("", "engine", *map(str, depths)):
        table.add_column(name, justify="right" if name.isdigit() else "left")
    rates = {(r["by"], r["engine"], r["queue_depth"]): r["bytes_per_second"] for r in report["sweep"]}
    for by, engine in dict.fromkeys((by, engine) for by, engine, _ in rates):
        table.add_row(by, engine, *(f"{rates[by, engine, depth] / 1e9:.2f}" for depth in depths))
    return table


def _duel_table(report: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title=f"in alternation, medians of {report['options']['repeats']} rounds")
    for name in ("", "engine", "in flight", "GB/s", "low to high", "of fio's best"):
        table.add_column(name, justify="left" if name in ("", "engine") else "right")
    for row in report["duel"]:
        ratio = row.get("ratio_to_fio")
        table.add_row(
            row["by"],
            row["engine"],
            str(row["queue_depth"]),
            f"{row['bytes_per_second'] / 1e9:.3f}",
            f"{row['low'] / 1e9:.2f} to {row['high'] / 1e9:.2f}",
            "" if ratio is None else f"{ratio:.1%}",
        )
    return table
