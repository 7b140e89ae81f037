"""Measure a model that does not fit into memory: speed, bound, hits and peak memory at several budgets."""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

from flashmoe.cli import bench_report, options
from flashmoe.cli.demo import find_demo_bundle
from flashmoe.errors import FlashmoeError
from flashmoe.types import format_size


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `flashmoe bench stream`."""
    bench_report.add_bundle(parser)
    parser.add_argument(
        "--memory",
        type=options.sizes,
        default=[None],
        metavar="SIZE,SIZE",
        help="budgets, like 3GiB,6GiB (default: auto)",
    )
    parser.add_argument("--tokens", type=options.count, default=32, metavar="N", help="decoded (default 32)")
    parser.add_argument(
        "--warm", type=options.count, default=16, metavar="N", help="decoded before (default 16)"
    )
    parser.add_argument(
        "--prompt",
        type=options.whole,
        default=0,
        metavar="N",
        help="then a prompt of N tokens (default: none)",
    )
    parser.add_argument(
        "--parallel",
        type=options.count,
        default=1,
        metavar="N",
        help="sequences decoded together (default 1)",
    )
    parser.add_argument("--lookahead", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--experts-per-token", type=options.count, metavar="N", help="lossy; to compare")
    bench_report.add_repeats(parser)


def execute(args: argparse.Namespace) -> int:
    """Measure each budget in turn, as often as asked, and report."""
    bundle = args.bundle or find_demo_bundle()
    rows = [_measure(args, bundle, memory) for memory in args.memory]
    chosen = {"tokens": args.tokens, "warm": args.warm, "prompt": args.prompt, "repeats": args.repeats} | {
        "parallel": args.parallel,
        "lookahead": args.lookahead,
        "experts_per_token": args.experts_per_token,
    }
    report = bench_report.begin(bundle, chosen) | {
        "results": rows,
        "same_logits": len({row["logits_xxh3"] for row in rows}) == 1,
    }
    bench_report.finish(args, report, _show)
    return 0 if report["same_logits"] else 1


def _measure(args: argparse.Namespace, bundle: Path, memory: int | None) -> dict[str, Any]:
    """Medians over the repeats of one budget."""
    from flashmoe.bench.stream import StreamOptions, measure_in_process

    wanted = StreamOptions(
        str(bundle),
        memory,
        args.warm,
        args.tokens,
        args.prompt,
        args.lookahead,
        args.experts_per_token,
        parallel=args.parallel,
    )
    runs = []
    for repeat in range(args.repeats):
        size = "default" if memory is None else format_size(memory)
        bench_report.note(f"{size}, {repeat + 1} of {args.repeats}")
        runs.append(measure_in_process(wanted))
    if len({run["logits_xxh3"] for run in runs}) != 1:
        raise FlashmoeError(f"{bundle}: two runs gave different logits: report this as a bug")
    row: dict[str, Any] = _median(runs)
    return row


def _median(values: list[Any]) -> Any:
    """The same structure with the median of every number; anything else is the first's."""
    first = values[0]
    if isinstance(first, dict):
        return {key: _median([value[key] for value in values]) for key in first}
    numbers = all(isinstance(value, int | float) for value in values)
    return median(values) if numbers else first


def _rate(tokens: float) -> str:
    """Three digits, and no exponent for fast ones."""
    return f"{tokens:.0f}" if tokens >= 100 else f"{tokens:.3g}"


def _show(report: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title=f"{report['model']}, medians of {report['options']['repeats']} runs")
    columns = [
        "memory",
        "",
        "tok/s",
        "bound",
        "of bound",
        "hits",
        "MB/token",
        "drive GB/s",
        "busy",
        "stalled",
    ]
    for name in [*columns, "peak"]:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in report["results"]:
        kinds = [kind for kind in ("decode", "prefill", "decode_after") if kind in row]
        for kind in kinds:
            one = row[kind]
            table.add_row(
                format_size(row["memory_bytes"]) if kind == "decode" else "",
                kind.replace("_", " "),
                _rate(one["tok_s"]),
                _rate(one["bound_tok_s"]),
                f"{one['share_of_bound']:.0%}",
                "" if one["hit_rate"] is None else f"{one['hit_rate']:.0%}",
                f"{one['missed_bytes_per_token'] / 1e6:.4g}",
                f"{one['drive_rate'] / 1e9:.2f}",
                f"{one['drive_busy_share']:.0%}",
                f"{one['stall_share']:.0%}",
                format_size(row["peak_memory_bytes"]) if kind == "decode" else "",
            )
    console = bench_report.console()
    console.print(table)
    for row in report["results"]:
        layer = row["decode"]["layer_ms"]
        parts = ", ".join(f"{name} {layer[name]:.2f}" for name in ("compute", "read", "stall"))
        decode = row["decode"]
        line = f"{format_size(row['memory_bytes'])}: {layer['total']:.2f} ms a layer ({parts}), "
        line += f"memory at {decode['memory_rate'] / 1e9:.1f} GB/s"
        if decode["missed_bytes_per_token"]:
            line += f"; {decode['share_of_reachable']:.0%} of the {_rate(decode['reachable_tok_s'])} tok/s that are "
            line += "reachable, since nobody foresees a token's first layer"
        console.print(line)
    console.print(
        "all budgets gave the same logits" if report["same_logits"] else "LOGITS DIFFER: report this as a bug"
    )
