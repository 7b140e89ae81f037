"""Train a replacement policy on a recorded routing trace."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flashmoe.cli import options
from flashmoe.errors import ConfigError


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `flashmoe cache`."""
    parser.usage = "flashmoe cache train TRACE.npz (--bundle BUNDLE | -o FILE) [options]"
    parser.add_argument("action", choices=("train",), help="what to do")
    parser.add_argument("trace", type=Path, metavar="TRACE.npz", help="of `flashmoe run --record-trace`")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="the policy's file (default: kept in BUNDLE, which then runs with it)",
    )
    parser.add_argument(
        "--kind",
        choices=("forecast", "flashmoe-net", "pairwise"),
        default="forecast",
        help="what is trained (default: %(default)s, which wins)",
    )
    parser.add_argument(
        "--part",
        choices=("all", "train"),
        default="all",
        help="train: keep two sequences of five for judging",
    )
    parser.add_argument(
        "--horizon",
        type=options.rate,
        metavar="STEPS",
        help="of a forecast: smaller for smaller pools (default 5)",
    )
    parser.add_argument(
        "--cold",
        action="store_true",
        help="of flashmoe-net: history begins anew with each sequence, as in `flashmoe simulate --cold`",
    )
    parser.add_argument(
        "--bundle",
        type=Path,
        metavar="BUNDLE",
        help="the bundle that the policy is for; with -o, when it is not the one that was recorded",
    )
    options.add_json(parser)


def execute(args: argparse.Namespace) -> int:
    """Train, write the file, and say what it holds."""
    from dataclasses import replace

    from flashmoe.bench.split import part_of
    from flashmoe.learning.forecast import ForecastOptions
    from flashmoe.learning.train import train
    from flashmoe.store.policies.learned_file import save_learned
    from flashmoe.store.policies.registry import IN_BUNDLE
    from flashmoe.store.trace import read_trace

    if args.output is None and args.bundle is None:
        raise ConfigError("say where the policy goes: --bundle BUNDLE to keep it there, or -o FILE")
    identity = None if args.bundle is None else _identity(args.bundle)
    output = args.output or args.bundle / IN_BUNDLE
    trace = part_of(read_trace(args.trace).decoding(), args.part)
    if identity is not None:
        trace = replace(trace, model=identity)
    layers = len(trace.layers)

    def progress(layer: int) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[2Klayer {layer + 1} of {layers}", end="", file=sys.stderr, flush=True)

    horizon = args.horizon or ForecastOptions.horizon
    learned = train(trace, args.kind, horizon=horizon, cold=args.cold, progress=progress)
    if sys.stderr.isatty():
        print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
    save_learned(output, learned)
    report = {"file": str(output), "kind": learned.kind, "model": learned.model} | learned.about
    report |= {"layers": layers, "experts": learned.experts, "nbytes": output.stat().st_size}
    if args.json:
        options.print_json(report)
    else:
        use = (
            "the bundle runs with it now" if args.output is None else f"use it with --policy learned:{output}"
        )
        print(
            f"{output}: {learned.kind}, {layers} layers of {learned.experts} experts, learned from "
            f"{report['tokens']} tokens; {use}"
        )
    return 0


def _identity(path: Path) -> str:
    from flashmoe.bundle.manifest import load_manifest

    return load_manifest(path).experts_identity
