"""Load a server with many clients, or measure how soon a conversation's next turn is answered."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe import env
from flashmoe.cli import bench_report, options
from flashmoe.cli.demo import find_demo_bundle
from flashmoe.errors import ConfigError
from flashmoe.types import format_size

if TYPE_CHECKING:
    from flashmoe.bench.serve_client import Endpoint

# Neither secrets nor what only says where the report goes, which would tell others of this machine's folders.
_UNTOLD = ("api_key", "bundle", "results", "json")
_QUESTION = 64  # more than the tokens of a later turn's question and the template's markers


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `flashmoe bench serve`."""
    bench_report.add_bundle(parser)
    parser.add_argument("--url", help="load a server that runs already, like http://127.0.0.1:8080")
    parser.add_argument("--api-key", metavar="KEY", help="its key (default: $FLASHMOE_API_KEY, or none)")
    parser.add_argument(
        "--clients", type=options.count, default=32, metavar="N", help="at the same time (default 32)"
    )
    parser.add_argument("--seconds", type=options.rate, default=120.0, metavar="S", help="default: 120")
    parser.add_argument(
        "--tokens", type=options.count, metavar="N", help="of an answer (default 64; 32 with --conversation)"
    )
    parser.add_argument(
        "--conversation",
        type=options.count,
        metavar="N",
        help="instead: conversations that begin with N tokens, and how soon their next turns are answered",
    )
    parser.add_argument(
        "--side-by-side", type=options.count, default=4, metavar="N", help="so many of them (default 4)"
    )
    server = parser.add_argument_group("the server that it starts")
    server.add_argument("--memory", type=options.size, metavar="SIZE", help="ceiling of its process")
    server.add_argument("--context", type=options.count, metavar="N", help="tokens of one conversation")
    server.add_argument("--parallel", type=options.count, metavar="N", help="answers at the same time")
    server.add_argument("--cache-memory", type=options.size, metavar="SIZE", help="for the prefix cache")
    server.add_argument("--cache-dir", type=Path, metavar="DIR", help="for the prefix cache")
    bench_report.add_output(parser)


def execute(args: argparse.Namespace) -> int:
    """Measure and report; 1 when there were errors."""
    from flashmoe.bench.serve_client import Endpoint, started

    key = args.api_key or env.api_key()
    if args.url is not None:
        if args.bundle is not None:
            raise ConfigError("a bundle and --url exclude each other: give one")
        name, result = args.url, _measure(args, Endpoint(args.url, key))
    else:
        bundle = args.bundle or find_demo_bundle()
        name = Path(bundle).resolve().name
        with started(str(bundle), _server_options(args)) as url:
            result = _measure(args, Endpoint(url, key))
    asked = {key: value for key, value in vars(args).items() if key not in _UNTOLD}
    report = bench_report.begin(name, asked) | {"results": result}
    bench_report.finish(args, report, lambda whole: _show(whole["results"]))
    return 1 if result.get("errors") else 0


def _server_options(args: argparse.Namespace) -> list[str]:
    context = args.context
    if context is None and args.conversation is not None:
        turns = 3  # as ConversationOptions has it
        context = args.conversation + turns * (_answer_tokens(args) + _QUESTION)
    given = {
        "--memory": args.memory,
        "--context": context,
        "--parallel": args.parallel,
        "--cache-memory": args.cache_memory,
        "--cache-dir": args.cache_dir,
        "--queue": max(args.clients, 64),  # none is to be refused
    }
    return [str(word) for name, value in given.items() if value is not None for word in (name, value)]


def _answer_tokens(args: argparse.Namespace) -> int:
    tokens: int = args.tokens or (64 if args.conversation is None else 32)
    return tokens


def _measure(args: argparse.Namespace, endpoint: Endpoint) -> dict[str, Any]:
    from flashmoe.bench.serve_conversation import ConversationOptions, run_conversations
    from flashmoe.bench.serve_load import LoadOptions, run_load

    try:
        if args.conversation is None:
            load = LoadOptions(args.clients, args.seconds, _answer_tokens(args))
            return run_load(endpoint, load, bench_report.note)
        wanted = ConversationOptions(args.conversation, _answer_tokens(args), args.side_by_side)
        return run_conversations(endpoint, wanted, bench_report.note)
    finally:
        bench_report.note("")


def _show(result: dict[str, Any]) -> None:
    if "turns" in result:
        for number, turn in enumerate(result["turns"], 1):
            first = turn["first_token_s"]
            print(
                f"turn {number}: first token after {first['median']:.3g} s (at most {first['max']:.3g}); prompt of "
                f"{turn['prompt_tokens']:.0f} tokens, {turn['cached_tokens']:.0f} from the cache"
            )
        print(f"the second turn begins after {result['second_of_first']:.1%} of the first one's time")
        return
    first, fair, memory = result["first_token_s"], result["tokens_per_client"], result["memory"]
    errors = sum(result["errors"].values())
    print(
        f"{result['answers']} answers, {errors} errors in {result['seconds']:.0f} s; {result['tok_s']:.3g} tok/s"
    )
    for text, count in result["errors"].items():
        print(f"  {count} x {text}")
    if first["p50"] is not None:
        print(f"first token after {first['p50']:.3g} s (p95 {first['p95']:.3g}, max {first['max']:.3g})")
    index = "" if result["fairness"] is None else f"; Jain's index {result['fairness']:.4f}"
    print(
        f"tokens of a client: {fair['min']}, {fair['median']:.0f}, {fair['max']} (least, median, most){index}"
    )
    sizes = ", ".join(format_size(nbytes) for nbytes in memory["bytes"])
    slope = memory["slope_bytes_per_minute"] / (1 << 20)
    print(f"memory at 0, 25, 50, 75, 100 %: {sizes}; {slope:+.2f} MiB a minute after the first quarter")
