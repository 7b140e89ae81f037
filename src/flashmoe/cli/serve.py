"""Serve a model over HTTP: OpenAI's and Anthropic's APIs, several conversations side by side."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flashmoe import env
from flashmoe.cli import options, prefix_options
from flashmoe.cli.demo import find_demo_bundle
from flashmoe.errors import ConfigError
from flashmoe.types import format_size

if TYPE_CHECKING:
    from flashmoe.chat.llm import LLM
    from flashmoe.engine.prefix_cache import PrefixCache
    from flashmoe.server.service import Service

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
_DRAIN_SECONDS = 30


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `flashmoe serve`."""
    parser.add_argument("bundle", nargs="?", type=Path, metavar="BUNDLE", help="default: the demo model")
    network = parser.add_argument_group("network")
    network.add_argument("--host", default="127.0.0.1", help="default: this machine only")
    network.add_argument("--port", type=options.port, default=8080, help="default: 8080; 0 takes a free one")
    network.add_argument(
        "--api-key", metavar="KEY", help="clients must send it (default: $FLASHMOE_API_KEY, or none)"
    )
    network.add_argument(
        "--max-body", type=options.size, default=4 << 20, metavar="SIZE", help="longest request (4MiB)"
    )
    network.add_argument(
        "--queue", type=options.count, default=64, metavar="N", help="requests that may wait (default 64)"
    )
    network.add_argument("--name", help="the model's name in answers (default: the directory's)")
    network.add_argument(
        "--drain",
        type=options.whole,
        default=_DRAIN_SECONDS,
        metavar="SECONDS",
        help="on SIGTERM, time for running answers to finish (default 30)",
    )
    machine = parser.add_argument_group("machine")
    options.add_memory(machine)
    machine.add_argument("--context", type=options.count, metavar="N", help="tokens of one conversation")
    machine.add_argument(
        "--parallel", type=options.count, default=4, metavar="N", help="answers at the same time (default 4)"
    )
    machine.add_argument("--threads", type=options.count, metavar="N", help="default: every processor")
    machine.add_argument("--io", choices=("auto", "direct", "buffered"), default="auto")
    machine.add_argument(
        "--expert-slots", type=options.slots, metavar="N", help="experts kept in memory, or a share like 25%%"
    )
    machine.add_argument("--lookahead", choices=("auto", "on", "off"), default="auto")
    options.add_kv_cache(machine)
    options.add_usage_file(machine)
    options.add_experts_dirs(machine, options.MOVED_DIR)
    options.add_policy(machine)
    prefix_options.configure(parser)


def execute(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"serving needs {', '.join(missing)}: pip install 'flashmoe[server]'")
    from flashmoe.chat.llm import LLM

    bundle = args.bundle or find_demo_bundle()
    reserved = prefix_options.reserved_nbytes(args)
    with LLM(
        bundle,
        memory=args.memory,
        context=args.context,
        threads=args.threads,
        kv_cache=args.kv_cache,
        io=args.io,
        expert_slots=args.expert_slots,
        lookahead=args.lookahead,
        experts_dirs=args.experts_dirs,
        usage_file=args.usage_file,
        policy=args.policy,
        record_trace=args.record_trace,
        sequences=args.parallel,
        prefix_cache=reserved,
    ) as llm:
        options.print_notice(llm.notice)
        prefixes = prefix_options.open_cache(args, llm, reserved)
        try:
            return _serve(args, llm, prefixes, args.name or Path(bundle).resolve().name)
        finally:
            prefixes.close()


def _serve(args: argparse.Namespace, llm: LLM, prefixes: PrefixCache, name: str) -> int:
    from flashmoe.engine.scheduler import Scheduler
    from flashmoe.server.app import Limits, create_app
    from flashmoe.server.listen import listen, serve
    from flashmoe.server.service import Service

    listener = listen(args.host, args.port)
    scheduler = Scheduler(llm.engine, prefix_cache=prefixes, most_waiting=args.queue)
    service = Service(llm, scheduler, name)
    app = create_app(service, Limits(args.api_key or env.api_key(), args.max_body))
    service.start()
    try:
        print(_announcement(service, listener.getsockname()), file=sys.stderr, flush=True)
        serve(app, listener, service, args.drain)
    finally:
        service.stop(0)
    return 0


def _announcement(service: Service, address: tuple[str, int]) -> str:
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    plan = service.llm.plan
    why = plan.budget_reason and f" (auto: {plan.budget_reason})"
    experts = f"{plan.slots} of {plan.experts} experts" if plan.experts else "no experts"
    return (
        f"flashmoe: {service.name} at http://{host}:{address[1]}/v1, {plan.sequences} answers at a time of up to "
        f"{plan.context} tokens, {experts} within {format_size(plan.budget_nbytes)}{why}"
    )
