"""Show what a bundle holds, or what a checkpoint or config.json would become, and how memory is split."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe.cli import options
from flashmoe.errors import BudgetError
from flashmoe.types import format_size

if TYPE_CHECKING:
    from flashmoe.engine.memory import Demand, MemoryPlan

_SHOWN_UNKNOWN = 5


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `flashmoe inspect`."""
    parser.add_argument(
        "path",
        type=Path,
        metavar="PATH",
        help="a bundle, a checkpoint (directory or .gguf file) or a config.json",
    )
    parser.add_argument("--bits", metavar="BITS", help="for a checkpoint or config: as convert --bits would")
    options.add_memory(parser)
    parser.add_argument("--context", type=options.count, metavar="N", help="plan this many tokens of context")
    options.add_kv_cache(parser)
    options.add_json(parser)


def execute(args: argparse.Namespace) -> int:
    """Describe and plan; a budget that was asked for and is too small is an error."""
    from flashmoe.convert import describe

    facts = describe(args.path, bits=args.bits)
    plan, refusal = _plan(args, facts)
    if args.json:
        options.print_json(facts | {"plan": None if plan is None else _plan_facts(plan)})
    else:
        print(_describe(args.path, facts), "", plan.describe() if plan else refusal, sep="\n")
    return 0


def _plan(args: argparse.Namespace, facts: dict[str, Any]) -> tuple[MemoryPlan | None, str]:
    """The split of the budget; or, when none was asked for and the machine is too small, the reason."""
    from flashmoe.engine.memory import make_plan

    try:
        with tokenizer_held(args.path):
            return make_plan(model_demand_of(args, facts), args.memory), ""
    except BudgetError as error:
        if args.memory is not None:
            raise
        return None, str(error)


@contextmanager
def tokenizer_held(path: Path) -> Iterator[None]:
    """Memory as it is when a run plans: with its tokenizer, more than 100 MiB for a vocabulary of 248,320."""
    from flashmoe.engine.tokenizer import TextTokenizer

    held = TextTokenizer.open(path) if (path / "tokenizer.json").is_file() else None
    try:
        yield
    finally:
        del held


def config_of(path: Path) -> dict[str, Any]:
    """The raw config.json of a bundle, a checkpoint, or itself, which describe() has read already."""
    from flashmoe.checkpoint import Checkpoint
    from flashmoe.checkpoint.gguf.model import find_gguf

    if find_gguf(path):
        return Checkpoint.open(path).config
    raw: dict[str, Any] = json.loads((path if path.is_file() else path / "config.json").read_bytes())
    return raw


def model_demand_of(args: argparse.Namespace, facts: dict[str, Any]) -> Demand:
    """What the planner must know, from describe()'s facts and the options path, context and kv_cache."""
    from flashmoe.engine.loading import model_demand, with_experts_per_token
    from flashmoe.models.registry import find_family

    raw = config_of(args.path)
    family = find_family(raw)
    config = with_experts_per_token(family.config(raw), facts["experts_per_token"] or None)
    return model_demand(
        family.architecture(config),
        resident_nbytes=facts["resident_nbytes"],
        record_nbytes=facts["record_nbytes"],
        experts=facts["expert_layers"] * facts["experts"],
        context=args.context,
        kv_cache=args.kv_cache or "f16",
        embedding_nbytes=facts["embedding_nbytes"],
    )


def _plan_facts(plan: MemoryPlan) -> dict[str, Any]:
    return dataclasses.asdict(plan) | {"slots_nbytes": plan.slots_nbytes}


def _describe(path: Path, facts: dict[str, Any]) -> str:
    from flashmoe.store.policies.registry import IN_BUNDLE

    attention = facts["attention_layers"]
    rows = [
        (facts["kind"], str(path)),
        (
            "model",
            f"{facts['model_type']}, hidden size {facts['hidden_size']}, vocabulary {facts['vocab_size']}",
        ),
        ("layers", f"{facts['layers']}: {attention} with attention, {facts['layers'] - attention} recurrent"),
        ("experts", _experts(facts)),
        *(("on drive", directory) for directory in facts.get("experts_dirs", ())),
        ("always needed", f"{format_size(facts['resident_nbytes'])} in memory"),
    ]
    if facts["embedding_nbytes"]:
        rows.append(("embedding", f"{format_size(facts['embedding_nbytes'])}, rows are read when needed"))
    rows += [("matrices", f"{count} x {codec}") for codec, count in facts["codecs"].items()]
    rows += [
        ("skipped", f"{part['prefix']}*: {part['tensors']} tensors, {format_size(part['nbytes'])}")
        for part in facts["skipped"]
    ]
    if facts["unknown"]:
        rows.append(("unknown", f"{len(facts['unknown'])}: {', '.join(facts['unknown'][:_SHOWN_UNKNOWN])}"))
    rows.append(("lossless", "yes" if facts["lossless"] else "no"))
    if (path / IN_BUNDLE).is_file():
        rows.append(("trained policy", f"{IN_BUNDLE}: used unless --policy says otherwise"))
    if facts["note"]:
        rows.append(("note", facts["note"]))
    return "\n".join(f"{name:<17} {value}" for name, value in rows)


def _experts(facts: dict[str, Any]) -> str:
    if not facts["experts"]:
        return "none: a dense model, all of it always in memory"
    return (
        f"{facts['experts']} in each of {facts['expert_layers']} layers, "
        f"{facts['experts_per_token']} per token; "
        f"{format_size(facts['expert_nbytes'])}, {format_size(facts['record_nbytes'])} each, "
        f"{format_size(facts['token_expert_nbytes'])} per token"
    )
