"""Make a bundle of a real model's exact shape with random weights, to measure speed without a download."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from flashmoe.cli import options
from flashmoe.cli.convert import BITS_HELP
from flashmoe.types import format_size


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `flashmoe synth`."""
    parser.add_argument("config", type=Path, metavar="CONFIG.json", help="a model's config.json")
    parser.add_argument("bundle", type=Path, metavar="DST", help="directory to write")
    parser.add_argument("--layers", type=options.count, metavar="N", help="only the first N layers")
    parser.add_argument("--bits", default="4", metavar="BITS", help=f"{BITS_HELP} (default: %(default)s)")
    parser.add_argument(
        "--router-skew",
        type=options.real,
        default=0.0,
        metavar="S",
        help="how unevenly experts are chosen; 0 is even (default)",
    )
    parser.add_argument("--seed", type=options.whole, default=0, metavar="N", help="default: %(default)s")
    options.add_experts_dirs(parser, "an empty directory for its share of the experts")
    options.add_json(parser)


def execute(args: argparse.Namespace) -> int:
    """Write the bundle and say what it holds."""
    from flashmoe.cli.progress import ProgressLine
    from flashmoe.convert import synth

    with ProgressLine("writing") as progress:
        report = synth(
            args.config,
            args.bundle,
            layers=args.layers,
            bits=args.bits,
            router_skew=args.router_skew,
            seed=args.seed,
            experts_dirs=args.experts_dirs,
            progress=progress,
        )
    if args.json:
        options.print_json(dataclasses.asdict(report))
    else:
        print(f"{report.path}: {report.layers} layers, {format_size(report.nbytes)} of random weights")
    return 0
