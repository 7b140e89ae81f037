"""Generate text with a bundle; without one, with the embedded demo model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from flashmoe.cli import model_options, options, structured
from flashmoe.cli.demo import find_demo_bundle
from flashmoe.errors import PromptError
from flashmoe.types import format_size

if TYPE_CHECKING:
    from flashmoe.chat.llm import LLM, Chunk

_STATS = (
    "decode_tok_s",
    "prefill_tok_s",
    "bound_tok_s",
    "hit_rate",
    "bytes_read",
    "peak_memory_bytes",
    "budget_bytes",
)
# An answer of the demo model at this length takes some seconds on two cores.
_MAX_TOKENS = 256


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `flashmoe run`."""
    parser.usage = "flashmoe run [options] [BUNDLE] PROMPT"
    parser.add_argument(
        "words",
        nargs="+",
        metavar="[BUNDLE] PROMPT",
        help="a bundle's directory (default: the demo model), and the prompt; - reads it from stdin",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message before the prompt")
    parser.add_argument(
        "--raw", action="store_true", help="continue the prompt as it is, without the chat template"
    )
    parser.add_argument(
        "--max-tokens", type=options.count, default=_MAX_TOKENS, metavar="N", help="default: %(default)s"
    )
    model_options.add_sampling(parser)
    structured.configure(parser)
    parser.add_argument(
        "--stats",
        action="store_true",
        help="hit rate and stalls of each layer, and the drive, live on stderr (a table where that is no terminal)",
    )
    model_options.add_machine(parser)
    model_options.add_lossy(parser)
    options.add_json(parser)


def execute(args: argparse.Namespace) -> int:
    """Generate, streaming to stdout, and close with one line of measurements on stderr."""
    bundle, prompt = _split_words(args.words)
    form = structured.form(args)
    from flashmoe.chat.llm import LLM  # after the options are checked: this loads numpy and the native core

    with LLM(
        bundle or find_demo_bundle(),
        structured=form is not None,
        **model_options.load_options(args),
    ) as llm:
        if llm.lossy:
            print(f"flashmoe: {model_options.lossy_note(llm)}", file=sys.stderr)
        options.print_notice(llm.notice)
        params = llm.sampling_params(max_tokens=args.max_tokens, **model_options.given_sampling(args))
        chunks = llm.stream(_prompt_ids(llm, prompt, args), params, structured=form)
        if args.stats:
            _run_with_stats(llm, chunks, args.json)
        elif args.json:
            options.print_json(_report(llm, list(chunks)))
        else:
            _show(llm, chunks)
        known = llm.notice
    if llm.notice != known:  # the file is written in the end
        options.print_notice(llm.notice)
    return 0


def _split_words(words: list[str]) -> tuple[str | None, str]:
    if len(words) > 2:
        raise _usage_error(f"expected [BUNDLE] PROMPT, got {len(words)} words: put the prompt in quotes")
    prompt = _read_stdin() if words[-1] == "-" else words[-1]
    return (words[0] if len(words) == 2 else None), prompt


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise PromptError(f"the prompt on stdin is no {error.encoding} text: give it in UTF-8") from error


def _usage_error(message: str) -> SystemExit:
    print(f"flashmoe run: error: {message}", file=sys.stderr)
    return SystemExit(2)


def _prompt_ids(llm: LLM, prompt: str, args: argparse.Namespace) -> list[int]:
    if args.raw:
        return llm.tokenizer.encode((args.system or "") + prompt)
    messages = [{"role": "user", "content": prompt}]
    if args.system:
        messages.insert(0, {"role": "system", "content": args.system})
    return llm.chat_ids(messages, **model_options.template_variables(args))


def _report(llm: LLM, answer: Sequence[Chunk]) -> dict[str, Any]:
    stats = llm.stats()
    report: dict[str, Any] = {
        "text": "".join(chunk.text for chunk in answer),
        "token_ids": [chunk.token_id for chunk in answer if chunk.token_id is not None],
        "finish_reason": answer[-1].finish_reason,
        "stats": {name: stats[name] for name in _STATS},
    }
    if llm.lossy:
        report |= {"experts_per_token": llm.experts_per_token, "kv_cache": llm.kv_cache, "lossy": True}
    return report


def _show(llm: LLM, chunks: Iterator[Chunk]) -> None:
    shown = False
    try:
        for chunk in chunks:
            shown = True  # before: Ctrl-C may strike while it is printed
            print(chunk.text, end="", flush=True)
    finally:
        if shown:  # also when interrupted: the next line is not the answer's
            print(flush=True)
    print(closing_line(llm.stats()), file=sys.stderr)


def _run_with_stats(llm: LLM, chunks: Iterator[Chunk], as_json: bool) -> None:
    from flashmoe.cli.live import StatsView

    answer: list[Chunk] = []
    shown = False
    view = StatsView(llm.cache_stats)
    try:
        with view:
            for chunk in chunks:
                shown = not as_json
                tokens = int(chunk.token_id is not None)
                if as_json:
                    view.count(tokens)
                    answer.append(chunk)
                else:
                    view.write(chunk.text, tokens)
    finally:
        if shown:
            print(flush=True)
    if as_json:
        options.print_json(_report(llm, answer) | {"totals": view.totals(), "layers": view.layers()})
        return
    view.close()
    print(closing_line(llm.stats()), file=sys.stderr)


def closing_line(stats: dict[str, Any]) -> str:
    """The measurements of a request in one line; what could not be measured (a single token) is left out."""
    parts = []
    if stats["decode_tok_s"] is not None:
        parts.append(f"{stats['decode_tok_s']:.2f} tok/s{_of_bound(stats)}")
    if stats["hit_rate"] is not None:
        parts.append(f"hit rate {stats['hit_rate']:.1%}")
    parts.append(f"{stats['bytes_read'] / 1e9:.3f} GB read")
    peak, budget = format_size(stats["peak_memory_bytes"]), format_size(stats["budget_bytes"])
    why = f" (auto: {stats['budget_reason']})" if stats.get("budget_reason") else ""
    parts.append(f"peak memory {peak} of a {budget} budget{why}")
    return ", ".join(parts)


def _of_bound(stats: dict[str, Any]) -> str:
    bound = stats["bound_tok_s"]
    return "" if bound is None else f" ({stats['decode_tok_s'] / bound:.0%} of the {bound:.2f} tok/s bound)"
