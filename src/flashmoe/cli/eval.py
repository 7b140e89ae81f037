"""Measure how good a bundle is.

Perplexity of a text (and with --against how far the bundle is from a better one of the same model), multiple-choice
questions by log-likelihood, answers held to a JSON Schema, tool calls.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe.cli import eval_sweep, options

if TYPE_CHECKING:
    from flashmoe.chat.llm import LLM
    from flashmoe.evaluation.windows import Window

# What a token sees at most: long enough that more context hardly helps a small model, short enough for two cores.
_WINDOW = 1024
_TASKS = (
    ("--choices", 'questions {"prompt", "choices": [...], "answer": index}, answered by log-likelihood'),
    ("--json-tasks", 'requests {"prompt" or "messages", "schema"}: is the answer JSON?'),
    ("--tool-calls", 'requests {"prompt" or "messages", "tools", "name", "arguments"}: is the call right?'),
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `flashmoe eval`."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    what = parser.add_argument_group("what to measure", "at least one; JSONL files hold one object a line")
    what.add_argument("--text", type=Path, metavar="FILE", help="perplexity of a text in UTF-8")
    what.add_argument(
        "--against",
        type=Path,
        metavar="BUNDLE",
        help="with --text: divergence from this bundle",
    )
    for flag, text in _TASKS:
        what.add_argument(flag, type=Path, metavar="JSONL", help=text)
    _configure_windows(parser.add_argument_group("windows of the text"))
    _configure_model(parser)
    eval_sweep.configure(parser)
    options.add_json(parser)


def _configure_windows(windows: argparse._ArgumentGroup) -> None:
    windows.add_argument(
        "--window",
        type=options.count,
        default=_WINDOW,
        metavar="N",
        help="tokens of a window, and of the longest task (default: %(default)s)",
    )
    windows.add_argument(
        "--stride",
        type=options.count,
        metavar="N",
        help="tokens from one window's start to the next one's (default: the window, so that none is fed twice)",
    )
    windows.add_argument(
        "--rule",
        choices=("sliding", "halves"),
        default="sliding",
        help="sliding scores each token once; halves scores the second half of each window, like llama.cpp",
    )
    windows.add_argument(
        "--bos",
        choices=("auto", "on", "off"),
        default="auto",
        help="BOS before each window (default: as the model's own tokenizer does)",
    )
    windows.add_argument("--limit", type=options.count, metavar="N", help="only the first N windows")


def _configure_model(parser: argparse.ArgumentParser) -> None:
    machine = parser.add_argument_group("machine", "none of these changes a result")
    machine.add_argument(
        "--memory",
        type=options.size,
        metavar="SIZE",
        help="ceiling of the whole process, both bundles together",
    )
    machine.add_argument("--threads", type=options.count, metavar="N", help="default: every processor")
    lossy = parser.add_argument_group(
        "changes the output", "of BUNDLE; the one it is compared with runs as it should, on the float path"
    )
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


def execute(args: argparse.Namespace) -> int:
    """Measure what was asked for, and print it with how it was measured."""
    if args.sweep:
        return eval_sweep.execute(args)
    if not (args.text or args.choices or args.json_tasks or args.tool_calls):
        print("flashmoe eval: error: nothing to measure: give --text, --choices, ...", file=sys.stderr)
        return 2
    if args.against and not args.text:
        print("flashmoe eval: error: --against compares on a text: give --text", file=sys.stderr)
        return 2
    text = eval_sweep.read_text(args.text) if args.text else None
    with open_bundle(args, args.bundle, args.against is not None) as llm:
        report: dict[str, Any] = {
            "bundle": str(args.bundle),
            "activations": args.activations,
            "kv_cache": llm.plan.kv_cache,
            "experts_per_token": llm.experts_per_token,
            "lossy": llm.lossy,
        }
        if text is not None:
            report["text"] = _text(llm, text, args)
        report |= _tasks(llm, args)
    if args.json:
        options.print_json(report)
    else:
        print("\n".join(_summary(report)))
    return 0


def open_bundle(args: argparse.Namespace, bundle: Path, shared: bool) -> LLM:
    """shared: another bundle will be opened beside it, so half of the memory is its."""
    from flashmoe.bundle.reader import Bundle
    from flashmoe.chat.llm import LLM
    from flashmoe.engine.memory import auto_budget
    from flashmoe.evaluation.scoring import block_rows

    vocab = Bundle.open(bundle).text_config.get("vocab_size", 0)
    memory = args.memory
    if shared:
        memory = (memory or auto_budget().nbytes) // 2
    return LLM(
        bundle,
        memory=memory,
        context=args.window,
        threads=args.threads,
        experts_per_token=args.experts_per_token,
        activations=args.activations,
        kv_cache=args.kv_cache,
        structured=args.json_tasks is not None,
        logit_rows=block_rows(vocab if isinstance(vocab, int) else 0),
    )


def _open_reference(args: argparse.Namespace, first: LLM) -> LLM:
    """The better bundle in the other half of the memory, all its experts, on the float path."""
    from flashmoe import env

    # The plan of the second counts what the process holds by now; what the first will still touch must come on top.
    untouched = max(0, first.plan.budget_nbytes - env.current_memory())
    memory = 2 * first.plan.budget_nbytes - untouched
    given = {
        "memory": memory,
        "experts_per_token": None,
        "activations": "f32",
        "kv_cache": None,
        "json_tasks": None,
    }
    return open_bundle(argparse.Namespace(**vars(args) | given), args.against, False)


def _text(llm: LLM, text: str, args: argparse.Namespace) -> dict[str, Any]:
    windows, how = eval_sweep.windows_of(llm, text, args)
    began = time.perf_counter()
    result = _compare(llm, text, windows, args) if args.against else _perplexity(llm, windows)
    seconds = time.perf_counter() - began
    return {
        **how,
        **result,
        "seconds": seconds,
        "tok_s": sum(len(window.ids) for window in windows) / seconds,
    }


def _perplexity(llm: LLM, windows: list[Window]) -> dict[str, Any]:
    from flashmoe.cli.progress import ProgressLine
    from flashmoe.evaluation.perplexity import perplexity

    with ProgressLine("scoring", "tokens") as progress:
        return dataclasses.asdict(perplexity(llm.engine, windows, progress))


def _compare(llm: LLM, text: str, windows: list[Window], args: argparse.Namespace) -> dict[str, Any]:
    from flashmoe.cli.progress import ProgressLine
    from flashmoe.errors import ConfigError
    from flashmoe.evaluation.divergence import LiveReference, divergence

    with _open_reference(args, llm) as reference:
        sample = text[:10_000]
        if reference.tokenizer.encode(sample) != llm.tokenizer.encode(sample):
            raise ConfigError(
                f"{args.against} has another tokenizer than {args.bundle}: compare two of one model"
            )
        with ProgressLine("comparing", "tokens") as progress:
            result = divergence(llm.engine, LiveReference(reference.engine), windows, progress)
    return {"against": str(args.against), **dataclasses.asdict(result)}


def _tasks(llm: LLM, args: argparse.Namespace) -> dict[str, Any]:
    from flashmoe.cli.progress import ProgressLine
    from flashmoe.evaluation.answers import json_validity, tool_success
    from flashmoe.evaluation.choices import choice_accuracy

    report: dict[str, Any] = {}
    for name, file, measure in (
        ("choices", args.choices, choice_accuracy),
        ("json", args.json_tasks, json_validity),
        ("tool_calls", args.tool_calls, tool_success),
    ):
        if file is not None:
            with ProgressLine(name, "tasks") as progress:
                result = measure(llm, file, progress=progress)
            report[name] = {"file": str(file), **dataclasses.asdict(result)}
    return report


def _summary(report: dict[str, Any]) -> list[str]:
    lines = [_text_line(report["text"])] if "text" in report else []
    if "choices" in report:
        found = report["choices"]
        lines.append(
            f"choices: {found['accuracy']:.1%} right, {found['accuracy_per_byte']:.1%} per byte "
            f"({found['chance']:.1%} by chance), {found['questions']} questions"
        )
    if "json" in report:
        found = report["json"]
        lines.append(
            f"JSON: {found['valid_alone']:.1%} valid alone, {found['valid_held']:.1%} held to the schema within "
            f"{found['max_tokens']} tokens, {found['tasks']} tasks"
        )
    if "tool_calls" in report:
        found = report["tool_calls"]
        lines.append(
            f"tool calls: {found['any_call']:.1%} call, {found['right_name']:.1%} the right function, "
            f"{found['exact']:.1%} exactly as expected, {found['tasks']} tasks"
        )
    lines.append(
        f"activations {report['activations']}, KV cache {report['kv_cache']}, "
        f"{report['experts_per_token']} experts a token"
    )
    return lines


def _text_line(found: dict[str, Any]) -> str:
    bos = "no BOS" if found["bos"] is None else f"BOS {found['bos']}"
    how = (
        f"{found['windows']} windows of {found['window']}, stride {found['stride']}, rule {found['rule']}, {bos}; "
        f"{found['file']}, {found['tokens']} tokens, {found['tok_s']:.0f} tok/s"
    )
    if "mean_kl" in found:
        return (
            f"KL from {found['against']}: mean {found['mean_kl']:.5f}, 99 % below {found['p99_kl']:.4f} nats; "
            f"same top token {found['same_top']:.2%}; {found['nats_per_token']:.5f} nats a token, there "
            f"{found['reference_nats']:.5f} ({found['positions']} positions; {how})"
        )
    return (
        f"perplexity {found['perplexity']:.4f} +- {found['error']:.4f}, {found['nats_per_token']:.5f} nats a token "
        f"({found['scored_tokens']} scored; {how})"
    )
