"""Make a bundle from a checkpoint: safetensors or GGUF, plain or quantised (docs/formats.md).

Interrupted at any point and started again, it continues and ends with the same bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from flashmoe.cli import options
from flashmoe.errors import ConfigError
from flashmoe.types import format_size

if TYPE_CHECKING:
    from flashmoe.chat.llm import LLM
    from flashmoe.convert import Calibration, ConvertReport
    from flashmoe.convert.bits import Bits

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
    calibration = parser.add_argument_group(
        "calibration",
        "a text runs through the model first; needs room for a second bundle beside DST meanwhile",
    )
    calibration.add_argument(
        "--calibrate",
        type=Path,
        metavar="TEXT",
        help="fit codes to the inputs that a text in UTF-8 gives; with a target, also choose bits by layer and part",
    )
    calibration.add_argument(
        "--target-size",
        type=options.size,
        metavar="SIZE",
        help="of all weights: fewer bits where they cost least",
    )
    calibration.add_argument(
        "--target-bits", type=options.rate, metavar="B", help="a weight, scales included, instead of a size"
    )
    calibration.add_argument(
        "--calibration-windows",
        type=options.count,
        default=16,
        metavar="N",
        help="of 512 tokens, of which inputs are looked at; bits are tried on the first (default: %(default)s)",
    )
    calibration.add_argument("--memory", type=options.size, metavar="SIZE", help="ceiling of the calibration")
    options.add_json(parser)


def execute(args: argparse.Namespace) -> int:
    """Convert and say what was written."""
    from flashmoe.cli.progress import ProgressLine
    from flashmoe.convert import convert

    bits, calibration = _calibrate(args)
    with ProgressLine("converting") as progress:
        report = convert(
            args.source,
            args.bundle,
            bits=bits,
            fit=args.fit,
            calibration=calibration,
            consume_source=args.consume_source,
            experts_dirs=args.experts_dirs,
            progress=progress,
        )
    if calibration is not None:
        from flashmoe.evaluation.calibrate import finish

        finish(args.bundle)
    if args.json:
        options.print_json(dataclasses.asdict(report))
    else:
        print(_describe(report))
    return 0


def _calibrate(args: argparse.Namespace) -> tuple[Bits | str | None, Calibration | None]:
    """What --calibrate finds out: the bits that --target-size and the like ask for, else those of --bits."""
    chooses = args.target_size is not None or args.target_bits is not None
    if args.calibrate is None:
        if chooses:
            raise ConfigError("--target-size and --target-bits choose by a text: give --calibrate TEXT")
        return args.bits, None
    if chooses and (args.bits is not None or None not in (args.target_size, args.target_bits)):
        raise ConfigError("--bits, --target-size and --target-bits exclude each other: give one of them")
    from flashmoe.cli.eval_sweep import read_text
    from flashmoe.cli.progress import ProgressLine
    from flashmoe.evaluation.calibrate import WINDOW, CalibrationOptions, calibrate
    from flashmoe.evaluation.scoring import block_rows

    text = read_text(args.calibrate)
    wanted = CalibrationOptions(
        text,
        args.calibrate.name,
        windows=args.calibration_windows,
        target_nbytes=args.target_size,
        target_bits=args.target_bits,
    )

    def open_bundle(path: Path) -> LLM:
        from flashmoe.bundle.reader import Bundle
        from flashmoe.chat.llm import LLM

        rows = block_rows(int(Bundle.open(path).text_config.get("vocab_size", 0)))
        return LLM(path, memory=args.memory, context=WINDOW, logit_rows=rows)

    bits, calibration = calibrate(
        args.source, args.bundle, wanted, open_bundle, lambda what: ProgressLine(what, "steps")
    )
    return args.bits if bits is None else bits, calibration


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
