"""Make a bundle from a checkpoint: safetensors or GGUF, plain or quantised (docs/formats.md).

Interrupted at any point and started again, it continues and ends with the same bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from flashmoe.cli import options
from flashmoe.types import format_size

if TYPE_CHECKING:
    from flashmoe.convert import ConvertReport

BITS_HELP = "of the experts (2, 3, 4, 6, 8), or by part: experts=3,attention=8,head=6"
_SHOWN_UNKNOWN = 5


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `flashmoe convert`."""
    parser.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="directory with config.json and *.safetensors, or a .gguf file",
    )
    parser.add_argument("bundle", type=Path, metavar="DST", help="directory to write")
    parser.add_argument(
        "--bits",
        metavar="BITS",
        help=f"{BITS_HELP} (default: a quantised checkpoint keeps its own, another one gets 4)",
    )
    parser.add_argument(
        "--fit",
        choices=("squares", "range"),
        default="squares",
        help="how floats become codes: least squares, or the range of each group, which is faster and worse",
    )
    parser.add_argument(
        "--consume-source",
        action="store_true",
        help="delete each source file once its content is safely written: half the disk space, no way back",
    )
    options.add_experts_dirs(parser, "an empty directory for its share of the experts")
    options.add_json(parser)


def execute(args: argparse.Namespace) -> int:
    """Convert and say what was written."""
    from flashmoe.cli.progress import ProgressLine
    from flashmoe.convert import convert

    with ProgressLine("converting") as progress:
        report = convert(
            args.source,
            args.bundle,
            bits=args.bits,
            fit=args.fit,
            consume_source=args.consume_source,
            experts_dirs=args.experts_dirs,
            progress=progress,
        )
    if args.json:
        options.print_json(dataclasses.asdict(report))
    else:
        print(_describe(report))
    return 0


def _describe(report: ConvertReport) -> str:
    """What was written and what was left out, a line each."""
    kept = "lossless" if report.lossless else "quantised"
    lines = [f"{report.path}: {format_size(report.nbytes)}, {kept}"]
    if report.resumed:
        lines.append("went on where an earlier conversion was interrupted")
    if report.note:
        lines.append(report.note)
    for part in report.skipped:
        size = format_size(part.nbytes)
        lines.append(f"skipped {part.prefix}*: {part.tensors} tensors, {size}, not needed to generate text")
    if report.unknown:
        some = ", ".join(report.unknown[:_SHOWN_UNKNOWN])
        lines.append(f"ignored {len(report.unknown)} tensors that this model type does not have: {some}")
    if report.deleted_shards:
        lines.append(f"deleted {len(report.deleted_shards)} source files")
    return "\n".join(lines)
