"""Write a bundle's weights as a Hugging Face checkpoint, dequantised, so that other engines can check them.

Interrupted and started again, it continues.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from flashmoe.cli import options
from flashmoe.types import format_size

if TYPE_CHECKING:
    from flashmoe.convert.export import ExportReport


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `flashmoe export`."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("checkpoint", type=Path, metavar="DST", help="directory to write")
    parser.add_argument(
        "--dtype",
        choices=("bf16", "f16", "f32"),
        default="bf16",
        help="of the weights; f32 holds every one exactly (default: %(default)s)",
    )
    parser.add_argument(
        "--shard-size", type=options.size, metavar="SIZE", help="of a file at most (default: 5 GB)"
    )
    options.add_json(parser)


def execute(args: argparse.Namespace) -> int:
    """Export and say what was rounded."""
    from flashmoe.cli.progress import ProgressLine
    from flashmoe.convert.export import SHARD_NBYTES, export

    with ProgressLine("exporting") as progress:
        report = export(
            args.bundle,
            args.checkpoint,
            dtype=args.dtype,
            shard_nbytes=args.shard_size or SHARD_NBYTES,
            progress=progress,
        )
    if args.json:
        options.print_json(dataclasses.asdict(report))
    else:
        print(_describe(report))
    return 0


def _describe(report: ExportReport) -> str:
    lines = [f"{report.path}: {format_size(report.nbytes)}, {report.tensors} tensors, {report.dtype}"]
    if report.resumed:
        lines.append("went on where an earlier export was interrupted; what follows is of this run")
    if report.rounded:
        lines.append(
            f"{report.rounded} tensors were rounded, by {report.largest_error:.1e} of their largest value at most; "
            "--dtype f32 holds them exactly"
        )
    else:
        lines.append("every value is exactly the bundle's")
    return "\n".join(lines)
