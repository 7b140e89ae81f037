"""The options of the prefix cache, wherever conversations go on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from flashmoe.cli import options

if TYPE_CHECKING:
    from flashmoe.chat.llm import LLM
    from flashmoe.engine.memory import MemoryPlan
    from flashmoe.engine.prefix_cache import PrefixCache

_CACHE_SHARE = 20


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    group = parser.add_argument_group("prefix cache", "conversations go on where they were")
    group.add_argument(
        "--cache-memory",
        type=options.size,
        metavar="SIZE",
        help="default: a twentieth of --memory, and more where all experts fit",
    )
    group.add_argument("--cache-dir", type=Path, metavar="DIR", help="keep them on the drive too")
    group.add_argument(
        "--cache-dir-size", type=options.size, default=8 << 30, metavar="SIZE", help="default: 8GiB"
    )


def reserved_nbytes(args: argparse.Namespace) -> int:
    """Memory that the plan must set apart for it."""
    from flashmoe.engine.memory import auto_budget

    if args.cache_memory is not None:
        return int(args.cache_memory)
    budget: int = args.memory or auto_budget().nbytes
    return budget // _CACHE_SHARE


def open_cache(args: argparse.Namespace, llm: LLM, reserved: int) -> PrefixCache:
    """The cache of a model that was loaded with so much set apart for it; close it.  Raises OSError."""
    from flashmoe.engine.prefix_cache import PrefixCache

    nbytes = reserved + (_spare(llm.plan) if args.cache_memory is None else 0)
    return PrefixCache(nbytes, llm.engine.identity, args.cache_dir, args.cache_dir_size)


def _spare(plan: MemoryPlan) -> int:
    """Bytes that neither experts nor anything else will need, up to what the running sequences themselves take."""
    if plan.slots < plan.experts:
        return 0
    used = plan.process_nbytes + plan.resident_nbytes + plan.state_nbytes + plan.workspace_nbytes
    return max(0, min(plan.budget_nbytes - used - plan.slots_nbytes, plan.state_nbytes))
