"""Check every byte of a bundle against its checksums."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from flashmoe.cli import options
from flashmoe.types import format_size


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `flashmoe verify`."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    options.add_experts_dirs(parser, options.MOVED_DIR)
    options.add_json(parser)


def execute(args: argparse.Namespace) -> int:
    """Read it all; exit code 1 and a line for each damaged part when anything differs."""
    from flashmoe.bundle.reader import Bundle
    from flashmoe.bundle.verify import verify
    from flashmoe.cli.progress import ProgressLine

    bundle = Bundle.open(args.bundle, args.experts_dirs)
    with ProgressLine("verifying") as progress:
        report = verify(bundle, progress)
    if args.json:
        options.print_json({"ok": report.ok, **dataclasses.asdict(report)})
    elif report.ok:
        print(f"{args.bundle}: all {format_size(report.nbytes)} are as they were written")
    for damage in report.damaged:
        print(f"flashmoe: error: {damage}", file=sys.stderr)
    return 0 if report.ok else 1
