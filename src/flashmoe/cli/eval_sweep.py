"""`flashmoe eval SOURCE --sweep bits,experts-per-token`: quality beside speed, for many forms of one model."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from flashmoe.cli import options
from flashmoe.errors import ConfigError, PromptError

if TYPE_CHECKING:
    from flashmoe.chat.llm import LLM
    from flashmoe.evaluation.windows import Window

AXES = ("bits", "experts-per-token")
_BITS = ("8", "4", "3", "2")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the sweep."""
    group = parser.add_argument_group(
        "sweep", "BUNDLE is then a checkpoint, converted into a temporary folder in each form; needs --text"
    )
    group.add_argument(
        "--sweep",
        type=_axes,
        metavar="AXES",
        help="what to vary: bits, experts-per-token, or bits,experts-per-token",
    )
    group.add_argument(
        "--bits",
        action="append",
        metavar="BITS",
        help="one form, as for convert; repeat it, the best first (default: 8, 4, 3, 2)",
    )
    group.add_argument(
        "--experts",
        type=options.numbers,
        metavar="N,N",
        help="experts a token (default: the model's own number, then fewer down to 1)",
    )
    group.add_argument("--fit", choices=("squares", "range"), default="squares", help="as for convert")
    group.add_argument(
        "--repeats", type=options.count, default=5, metavar="N", help="turns of the speed measurement"
    )
    group.add_argument("--plot", type=Path, metavar="PNG", help="draw quality over bytes a token")
    group.add_argument(
        "--temporary", type=Path, metavar="DIR", help="where the forms are written (default: TMPDIR)"
    )


def execute(args: argparse.Namespace) -> int:
    """Measure all forms, print a table (or --json), draw the plot."""
    from flashmoe.evaluation.sweep import table

    if not args.text:
        print("flashmoe eval: error: --sweep measures on a text: give --text", file=sys.stderr)
        return 2
    report = _measure(args)
    if args.plot:
        from flashmoe.evaluation.sweep_plot import plot_sweep

        plot_sweep(report, args.plot)
    if args.json:
        options.print_json(report)
    else:
        how = report["text"]
        print(table(report["variants"]))
        print(
            f"\n{how['file']} (xxh3 {how['xxh3']}): {how['positions']} positions in {how['windows']} windows of "
            f"{how['window']}, stride {how['stride']}, rule {how['rule']}; activations {args.activations}; KL and top "
            f"tokens against the first line; {report['machine']['processor']}, {report['machine']['threads']} threads"
        )
    return 0


def windows_of(llm: LLM, text: str, args: argparse.Namespace) -> tuple[list[Window], dict[str, Any]]:
    """The windows that the options ask for, and facts on them."""
    from flashmoe.evaluation.windows import cut

    bos = llm.tokenizer.bos_id(args.bos)
    ids = llm.tokenizer.encode(text, add_special_tokens=False)
    stride = args.window if args.rule == "halves" else args.stride or args.window
    windows = list(cut(ids, args.window, stride, bos, args.rule))[: args.limit]
    return windows, {
        "file": str(args.text),
        "xxh3": xxhash.xxh3_64_hexdigest(text.encode()),
        "tokens": len(ids),
        "windows": len(windows),
        "window": args.window,
        "stride": stride,
        "rule": args.rule,
        "bos": bos,
    }


def read_text(file: Path) -> str:
    """A text in UTF-8; raises PromptError when it is something else."""
    try:
        return file.read_bytes().decode()  # line ends as they are: they are part of what is scored
    except UnicodeDecodeError as error:
        raise PromptError(f"{file} is no UTF-8 text (byte {error.start}): convert it") from error


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    from flashmoe.bench.machine import describe_machine
    from flashmoe.cli.progress import ProgressLine
    from flashmoe.evaluation.sweep import SweepOptions, sweep

    text = read_text(args.text)
    how: dict[str, Any] = {}
    machine: dict[str, Any] = {}

    def cut_windows(llm: LLM) -> Sequence[Window]:
        windows, facts = windows_of(llm, text, args)
        how.update(facts)
        ops = llm.engine.ops
        machine.update(describe_machine(ops.isa, ops.threads))
        return windows

    wanted = SweepOptions(_bits(args), _experts(args), args.fit, args.repeats)
    with tempfile.TemporaryDirectory(prefix="flashmoe-sweep-", dir=args.temporary) as folder:
        rows = sweep(
            args.bundle,
            Path(folder),
            wanted,
            lambda bundle, experts: _open(args, bundle, experts),
            cut_windows,
            lambda what: ProgressLine(what, "steps"),
        )
    how["positions"] = rows[0]["positions"]
    facts = {"source": str(args.bundle), "fit": args.fit, "activations": args.activations}
    return {**facts, "text": how, "machine": machine, "variants": rows}


def _open(args: argparse.Namespace, bundle: Path, experts: int | None) -> LLM:
    from flashmoe.cli.eval import open_bundle

    return open_bundle(argparse.Namespace(**vars(args) | {"experts_per_token": experts}), bundle, False)


def _bits(args: argparse.Namespace) -> Sequence[str]:
    if "bits" not in args.sweep:
        if len(args.bits or []) > 1:
            raise ConfigError(
                "several --bits, and --sweep does not vary them: give --sweep bits,experts-per-token"
            )
        return args.bits or ("8",)
    return args.bits or _BITS


def _experts(args: argparse.Namespace) -> Sequence[int | None]:
    if "experts-per-token" in args.sweep:
        return args.experts or []
    if args.experts:
        raise ConfigError("--experts, and --sweep does not vary them: give --sweep bits,experts-per-token")
    return [args.experts_per_token]


def _axes(text: str) -> list[str]:
    axes = [part.strip() for part in text.split(",")]
    if not axes or any(axis not in AXES for axis in axes):
        raise argparse.ArgumentTypeError(f"{text!r} is not made of {' and '.join(AXES)}")
    return axes
