"""The options of whatever runs a model for one user: how it samples, what it may take of the machine, what is lossy."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from flashmoe.cli import options

if TYPE_CHECKING:
    from flashmoe.chat.llm import LLM
    from flashmoe.chat.options import LoadOptions

SAMPLING = (
    ("--temperature", options.real, "0 always takes the likeliest token"),
    ("--top-k", options.whole, "sample among the K likeliest tokens; 0 is all"),
    ("--top-p", options.real, "sample among the likeliest tokens that hold this probability together"),
    ("--min-p", options.real, "drop tokens less likely than this share of the likeliest one"),
    ("--presence-penalty", options.real, "subtracted once from tokens that were generated before"),
    ("--frequency-penalty", options.real, "subtracted for each time a token was generated before"),
    ("--repetition-penalty", options.real, "divides the logits of tokens seen before; 1 is off"),
    ("--seed", options.whole, "the same seed gives the same text"),
)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Sampling values, and whether the model thinks before it answers."""
    group = parser.add_argument_group("sampling", "each defaults to the model's own generation_config.json")
    for flag, kind, text in SAMPLING:
        group.add_argument(flag, type=kind, metavar="N" if kind is options.whole else "X", help=text)
    parser.add_argument(
        "--thinking",
        choices=("on", "off"),
        help="reason before the answer, where the model's chat template lets one choose (default: its own)",
    )


def given_sampling(args: argparse.Namespace) -> dict[str, Any]:
    """By the names of SamplingParams; None for what was not given."""
    names = [flag.removeprefix("--").replace("-", "_") for flag, _, _ in SAMPLING]
    return {name: getattr(args, name) for name in names}


def template_variables(args: argparse.Namespace) -> dict[str, Any]:
    """What the options say to the model's chat template."""
    return {} if args.thinking is None else {"enable_thinking": args.thinking == "on"}


def add_machine(parser: argparse.ArgumentParser) -> None:
    """What may be taken of the machine."""
    machine = parser.add_argument_group("machine", "none of these changes a bit of the output")
    options.add_memory(machine)
    machine.add_argument(
        "--context", type=options.count, metavar="N", help="longest prompt and answer, in tokens"
    )
    machine.add_argument("--threads", type=options.count, metavar="N", help="default: every processor")
    machine.add_argument(
        "--io", choices=("auto", "direct", "buffered"), default="auto", help="how experts are read"
    )
    machine.add_argument(
        "--expert-slots",
        type=options.slots,
        metavar="N",
        help="experts kept in memory, or a share like 25%% (default: as many as fit)",
    )
    machine.add_argument(
        "--lookahead",
        choices=("auto", "on", "off"),
        default="auto",
        help="read likely experts of the next layers while the drive is idle (default: while that helps)",
    )
    machine.add_argument(
        "--verify-reads", action="store_true", help="compare every weight with its checksum as it is read"
    )
    options.add_usage_file(machine)
    options.add_experts_dirs(machine, options.MOVED_DIR)
    options.add_policy(machine)


def add_lossy(parser: argparse.ArgumentParser) -> None:
    """What makes the output another than the model's own."""
    lossy = parser.add_argument_group("changes the output")
    lossy.add_argument(
        "--experts-per-token",
        type=options.count,
        metavar="N",
        help="other than the model's own number is lossy",
    )
    lossy.add_argument(
        "--activations", choices=("int8", "f32"), default="int8", help="f32 is the slow accuracy oracle"
    )
    options.add_kv_cache(lossy)


def load_options(args: argparse.Namespace) -> LoadOptions:
    """The arguments of LLM that add_machine() and add_lossy() have declared."""
    return {
        "memory": args.memory,
        "context": args.context,
        "threads": args.threads,
        "experts_per_token": args.experts_per_token,
        "activations": args.activations,
        "kv_cache": args.kv_cache,
        "io": args.io,
        "expert_slots": args.expert_slots,
        "lookahead": args.lookahead,
        "verify_reads": args.verify_reads,
        "experts_dirs": args.experts_dirs,
        "usage_file": args.usage_file,
        "policy": args.policy,
        "record_trace": args.record_trace,
    }


def lossy_note(llm: LLM) -> str:
    """Why the output is not the model's own."""
    reasons = []
    if llm.experts_per_token != llm.native_experts_per_token:
        native = llm.native_experts_per_token
        reasons.append(f"{llm.experts_per_token} experts per token instead of the model's own {native}")
    if llm.kv_cache == "int8":
        reasons.append("keys and values in 8 bits")
    return f"lossy: {', '.join(reasons)}"
