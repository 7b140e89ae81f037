"""Measure replacement policies in alternation on a running model: hits and tokens per second."""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

from flashmoe.cli import bench_report, options
from flashmoe.cli.demo import find_demo_bundle


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `flashmoe bench policies`."""
    bench_report.add_bundle(parser)
    driven = parser.add_mutually_exclusive_group(required=True)
    driven.add_argument(
        "--trace",
        type=Path,
        metavar="TRACE.npz",
        help="routers choose what this trace recorded (its test part, see `flashmoe simulate --part`)",
    )
    driven.add_argument(
        "--text", type=Path, metavar="FILE", help="decode this text; the model's own routers choose"
    )
    parser.add_argument(
        "--policy",
        default="lru,duel,learned",
        metavar="NAME,NAME",
        help="compared with the first (default: %(default)s); `learned` is trained here, on the trace's train part or "
        "the text's beginning, learned:FILE is a file of `flashmoe cache train`",
    )
    parser.add_argument(
        "--slots", type=options.count, required=True, metavar="N", help="experts in memory, for each layer"
    )
    options.add_memory(parser)
    parser.add_argument(
        "--teach", type=options.count, default=1024, metavar="N", help="tokens of --text to learn from (1024)"
    )
    parser.add_argument(
        "--warm", type=options.count, default=64, metavar="N", help="decoded before (default 64)"
    )
    parser.add_argument(
        "--tokens", type=options.count, default=256, metavar="N", help="measured (default 256)"
    )
    bench_report.add_repeats(parser)


def execute(args: argparse.Namespace) -> int:
    """Measure in alternation and report."""
    from flashmoe.bench.policies import TrialOptions, compare

    bundle = args.bundle or find_demo_bundle()
    names = list(dict.fromkeys(name for name in args.policy.split(",") if name))
    wanted = TrialOptions(
        Path(bundle),
        names,
        args.slots,
        args.trace,
        args.text,
        args.memory,
        args.teach,
        args.warm,
        args.tokens,
        args.repeats,
    )
    runs = compare(wanted, bench_report.note)
    chosen = {key: value for key, value in vars(wanted).items() if key != "bundle"}
    for key in ("trace", "text"):
        chosen[key] = chosen[key] and chosen[key].name
    report = bench_report.begin(bundle, chosen) | {"runs": runs, "results": _summary(names, runs)}
    bench_report.finish(args, report, _show)
    return 0


def _summary(names: list[str], runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each policy: medians over its runs, and of the ratios of each round to the first policy."""
    first = {run["round"]: run["tok_s"] for run in runs if run["policy"] == names[0]}
    rows = []
    for name in names:
        mine = [run for run in runs if run["policy"] == name]
        row: dict[str, Any] = {"policy": name, "tok_s_of_each_run": [run["tok_s"] for run in mine]}
        row["ratio"] = median(run["tok_s"] / first[run["round"]] for run in mine)
        for key in (
            "tok_s",
            "hit_rate",
            "replayed_hit_rate",
            "missed_bytes_per_token",
            "drive_rate",
            "stall_share",
        ):
            row[key] = median(run[key] for run in mine)
        rows.append(row)
    return rows


def _show(report: dict[str, Any]) -> None:
    from rich.table import Table

    from flashmoe.store.policies.registry import label_of

    wanted = report["options"]
    source = wanted["trace"] or wanted["text"]
    title = f"{report['model']}: {wanted['slots']} slots a layer, {wanted['tokens']} tokens of {source}"
    columns = ["policy", "hits", "replayed", "tok/s", "ratio", "of each run", "MB/token", "GB/s", "stalled"]
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    for row in report["results"]:
        table.add_row(
            label_of(row["policy"]),
            f"{row['hit_rate']:.1%}",
            f"{row['replayed_hit_rate']:.1%}",
            f"{row['tok_s']:.4g}",
            f"{row['ratio']:.2f}",
            ", ".join(f"{value:.4g}" for value in row["tok_s_of_each_run"]),
            f"{row['missed_bytes_per_token'] / 1e6:.4g}",
            f"{row['drive_rate'] / 1e9:.2f}",
            f"{row['stall_share']:.0%}",
        )
    console = bench_report.console()
    console.print(table)
    console.print("all policies gave the same logits")
