"""Spread a bundle's experts over directories on several drives, which are then read at the same time.

Each expert moves to one of them and is checked on the way.  Interrupted and started again, it goes on; until the
end the bundle is what it was.  Where drives have moved, the same command with the new directories only links them.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from flashmoe.cli import options
from flashmoe.errors import ConfigError
from flashmoe.types import format_size


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `flashmoe stripe`."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    options.add_experts_dirs(parser, "an empty directory for its share of the experts")
    parser.add_argument("--together", action="store_true", help="bring all experts back into the bundle")
    options.add_json(parser)


def execute(args: argparse.Namespace) -> int:
    """Move the experts and say where they are."""
    from flashmoe.bundle.restripe import stripe
    from flashmoe.cli.progress import ProgressLine

    if bool(args.experts_dirs) == args.together:
        raise ConfigError("say where the experts shall be: --experts-dir DIR for each drive, or --together")
    with ProgressLine("copying") as progress:
        report = stripe(args.bundle, args.experts_dirs, progress)
    if args.json:
        options.print_json(dataclasses.asdict(report))
    else:
        done = f"copied {format_size(report.nbytes)}" if report.nbytes else "nothing had to be copied"
        print(f"{report.path}: {done}; experts are in {', '.join(map(str, report.directories))}")
    return 0
