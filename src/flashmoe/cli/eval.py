"""Measure how good a bundle is: the perplexity of a text under it."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe.cli import options
from flashmoe.errors import PromptError

if TYPE_CHECKING:
    from flashmoe.chat.llm import LLM

# What a token sees at most: long enough that more context hardly helps a small model, short enough for two cores.
_WINDOW = 1024


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `flashmoe eval`."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="a text in UTF-8 to predict")
    windows = parser.add_argument_group("windows of the text")
    windows.add_argument(
        "--window",
        type=options.count,
        default=_WINDOW,
        metavar="N",
        help="tokens of a window (default: %(default)s)",
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
        help="BOS before each window: auto is the model's own way",
    )
    windows.add_argument("--limit", type=options.count, metavar="N", help="only the first N windows")
    _configure_model(parser)
    options.add_json(parser)


def _configure_model(parser: argparse.ArgumentParser) -> None:
    machine = parser.add_argument_group("machine", "none of these changes a result")
    machine.add_argument("--memory", type=options.size, metavar="SIZE", help="ceiling of the whole process")
    machine.add_argument("--threads", type=options.count, metavar="N", help="default: every processor")
    lossy = parser.add_argument_group("changes the output")
    lossy.add_argument(
        "--experts-per-token", type=options.count, metavar="N", help="other than the model's own"
    )
    lossy.add_argument(
        "--activations", choices=("int8", "f32"), default="int8", help="f32 is the slow accuracy oracle"
    )
    options.add_kv_cache(lossy)


def execute(args: argparse.Namespace) -> int:
    """Score the text and print the perplexity with how it was measured."""
    text = _read_text(args.text)
    from flashmoe.bundle.reader import Bundle
    from flashmoe.chat.llm import LLM
    from flashmoe.evaluation.scoring import block_rows

    vocab = Bundle.open(args.bundle).text_config.get("vocab_size", 0)
    with LLM(
        args.bundle,
        memory=args.memory,
        context=args.window,
        threads=args.threads,
        experts_per_token=args.experts_per_token,
        activations=args.activations,
        kv_cache=args.kv_cache,
        logit_rows=block_rows(vocab if isinstance(vocab, int) else 0),
    ) as llm:
        report = _perplexity(llm, text, args)
    if args.json:
        options.print_json(report)
    else:
        print(_summary(report))
    return 0


def _read_text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"{file} is no UTF-8 text (byte {error.start}): convert it") from error


def _perplexity(llm: LLM, text: str, args: argparse.Namespace) -> dict[str, Any]:
    import dataclasses

    from flashmoe.cli.progress import ProgressLine
    from flashmoe.evaluation.perplexity import perplexity
    from flashmoe.evaluation.windows import cut

    bos = llm.tokenizer.bos_id(args.bos)
    ids = llm.tokenizer.encode(text, add_special_tokens=False)
    size, stride = args.window, args.stride or args.window
    windows = list(cut(ids, size, stride, bos, args.rule))[: args.limit]
    began = time.perf_counter()
    with ProgressLine("scoring", "tokens") as progress:
        result = perplexity(llm.engine, windows, progress)
    seconds = time.perf_counter() - began
    fed = sum(len(window.ids) for window in windows)
    return {
        "bundle": str(args.bundle),
        "text": str(args.text),
        "text_tokens": len(ids),
        "window": size,
        "stride": size if args.rule == "halves" else stride,
        "rule": args.rule,
        "bos": bos,
        **dataclasses.asdict(result),
        "activations": args.activations,
        "kv_cache": llm.plan.kv_cache,
        "experts_per_token": llm.experts_per_token,
        "lossy": llm.lossy,
        "seconds": seconds,
        "tok_s": fed / seconds,
    }


def _summary(report: dict[str, Any]) -> str:
    bos = "no BOS" if report["bos"] is None else f"BOS {report['bos']} before each window"
    return (
        f"perplexity {report['perplexity']:.4f} +- {report['error']:.4f} "
        f"({report['nats_per_token']:.5f} nats a token)\n"
        f"{report['scored_tokens']} tokens scored of {report['text_tokens']} in {report['text']}: "
        f"{report['windows']} windows of {report['window']}, stride {report['stride']}, rule {report['rule']}, {bos}\n"
        f"activations {report['activations']}, KV cache {report['kv_cache']}, "
        f"{report['experts_per_token']} experts a token; {report['tok_s']:.0f} tok/s"
    )
