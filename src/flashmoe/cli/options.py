"""Types of option values: argparse turns their refusals into usage errors (exit code 2)."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

from flashmoe.errors import ConfigError
from flashmoe.types import parse_size


def size(text: str) -> int:
    """Bytes of 6GiB, 800MiB, ..."""
    try:
        return parse_size(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def memory(text: str) -> int | None:
    """A memory budget in bytes; None for "auto"."""
    return None if text.strip() == "auto" else size(text)


def sizes(text: str) -> list[int | None]:
    """Memory budgets, separated by commas; None for each "auto"."""
    return [memory(part) for part in text.split(",")]


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def whole(text: str) -> int:
    """A whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def port(text: str) -> int:
    """A TCP port; 0 is any free one."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: give a number from 0 to 65535")
    return int(text)


def numbers(text: str) -> list[int]:
    """Whole numbers, separated by commas; an empty text is no number at all."""
    return [whole(part.strip()) for part in text.split(",")] if text.strip() else []


def rate(text: str) -> float:
    """A number above 0."""
    value = real(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def real(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def slots(text: str) -> str:
    """A number of expert slots, or a share of all experts such as 25%."""
    if not re.fullmatch(r"[1-9]\d*%?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of slots nor a share like 25%")
    return text


def add_memory(parser: argparse._ActionsContainer) -> None:
    """--memory, the same wherever one budget is split."""
    parser.add_argument(
        "--memory",
        type=memory,
        metavar="auto|SIZE",
        help="ceiling of the whole process, like 6GiB (default: auto, what machine and control groups can spare)",
    )


def add_usage_file(parser: argparse._ActionsContainer) -> None:
    """--usage-file, the same wherever a model is run for somebody."""
    parser.add_argument(
        "--usage-file",
        default="auto",
        metavar="auto|off|FILE",
        help="remembers which experts are used, to read those first at the next start (default: auto, in "
        "~/.cache/flashmoe/usage)",
    )


def add_kv_cache(parser: argparse._ActionsContainer) -> None:
    """--kv-cache, the same where a model is run and where its memory is planned."""
    parser.add_argument(
        "--kv-cache",
        choices=("f16", "int8", "f32"),
        help="how keys and values are kept (default: f16; int8 is half as large and lossy)",
    )


MOVED_DIR = "of a striped bundle, a directory that is not where its link leads"


def add_experts_dirs(parser: argparse._ActionsContainer, text: str) -> None:
    """--experts-dir, once for each directory."""
    parser.add_argument(
        "--experts-dir",
        action="append",
        type=Path,
        default=[],
        dest="experts_dirs",
        metavar="DIR",
        help=f"{text}; give it once for each drive",
    )


def add_policy(parser: argparse._ActionsContainer) -> None:
    """--policy and --record-trace, the same wherever a model is run."""
    parser.add_argument(
        "--policy",
        default="auto",
        metavar="NAME",
        help="which expert leaves the pool (default: %(default)s, a trained one in the bundle, else duel); "
        "learned:FILE is one of `flashmoe cache train`",
    )
    parser.add_argument(
        "--record-trace",
        type=Path,
        metavar="FILE.npz",
        help="record which experts each token used, for `flashmoe simulate` and `flashmoe cache train`",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json, the same in every command that reports."""
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout instead of text")


def print_json(value: dict[str, Any]) -> None:
    """The one object of a --json run."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_notice(text: str) -> None:
    """A line on stderr for what went another way than asked without being an error; nothing for an empty one."""
    if text:
        print(f"flashmoe: {text}", file=sys.stderr)
