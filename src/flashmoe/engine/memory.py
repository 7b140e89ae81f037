"""Splitting a memory budget: what must be resident, what a step needs, and how many expert slots are left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flashmoe import cgroups, env
from flashmoe.errors import BudgetError
from flashmoe.types import format_size

# Thread stacks, allocator slack, the interpreter's own growth while it generates: measured at about 20 MiB on the
# demo model and on the 35B shape; doubled.
RESERVE_NBYTES = 40 << 20
# Larger chunks read each expert fewer times per prompt but need more scratch memory.
CHUNKS = (2048, 1024, 512, 256, 128, 64, 32, 16)
# Scratch memory may take this share of what is left for slots before the chunk is halved.
_WORKSPACE_SHARE = 0.125
# Two starts of the same command differ in what the process holds when it plans: by 0.2 MiB, more when the first
# one still had to load its libraries.  The smallest budget that is named must work when it is tried.
_NAMED_SLACK_NBYTES = 4 << 20
# What turning a prompt into tokens takes for each of them, besides the text: at most 642 bytes with the demo's
# tokenizer (8,192 to 262,144 tokens).  It comes with each prompt, when the slots are full.
PROMPT_TOKEN_NBYTES = 700
# Of the memory that can be had, where the system does not tell who limits it (no Linux).
_AUTO_SHARE = 0.8


@dataclass(frozen=True)
class Demand:
    """What a model needs, in bytes, before any expert is cached."""

    resident_nbytes: int
    state_nbytes: int
    workspace_nbytes: Callable[[int], int]  # of a prefill chunk of n tokens
    record_nbytes: int
    experts: int  # over all layers
    min_slots: int
    context: int
    embedding_nbytes: int = (
        0  # left on the drive unless everything else fits: 0.5 ms a token at the 35B shape
    )
    kv_cache: str = "f16"
    sequences: int = 1  # that the state holds side by side


@dataclass(frozen=True)
class MemoryPlan:
    """A split that fits.  All sizes in bytes."""

    budget_nbytes: int
    process_nbytes: int
    resident_nbytes: int
    state_nbytes: int
    workspace_nbytes: int
    record_nbytes: int
    slots: int
    experts: int
    prefill_chunk: int
    context: int
    embedding_resident: bool = False  # counted in resident_nbytes
    kv_cache: str = "f16"
    sequences: int = 1
    budget_reason: str = ""  # where nobody named the budget: what decided it

    @property
    def slots_nbytes(self) -> int:
        """The expert pool."""
        return self.slots * self.record_nbytes

    def describe(self) -> str:
        """The plan as a few aligned lines."""
        share = self.slots / self.experts if self.experts else 1.0
        rows = [
            ("budget", self.budget_nbytes, self.budget_reason and f"auto: {self.budget_reason}"),
            ("process", self.process_nbytes, "interpreter, libraries, a prompt's tokens, reserve"),
            ("resident weights", self.resident_nbytes, ""),
            (
                "state",
                self.state_nbytes,
                f"{'one sequence' if self.sequences == 1 else f'{self.sequences} sequences'} of up to "
                f"{self.context} tokens, KV cache {self.kv_cache}",
            ),
            ("workspace", self.workspace_nbytes, f"prefill in chunks of {self.prefill_chunk} tokens"),
            (
                "expert slots",
                self.slots_nbytes,
                f"{self.slots} of {self.experts} experts ({share:.0%})"
                if self.experts
                else "the model has no experts",
            ),
        ]
        return "\n".join(f"{name:<17} {format_size(size):>11}  {note}".rstrip() for name, size, note in rows)


@dataclass(frozen=True)
class AutoBudget:
    """What `--memory auto` comes to, in bytes, and what it was that decided."""

    nbytes: int
    reason: str


def auto_budget(root: Path = Path("/")) -> AutoBudget:
    """As much as this process can have while the machine stays usable and no control group is exceeded.

    The least of what physical memory and each control group above this process leave: the limit, less what is in use
    (neighbours included, file cache that can be reclaimed not), less a reserve (cgroups.py), and again what this
    process holds already, since a budget is a ceiling of the whole process.  The same call later in the process gives
    the same number, unless others have taken or given back memory.  root: of proc and sys, for tests.
    """
    bounds = cgroups.limits(root)
    if not bounds:
        return AutoBudget(int(_AUTO_SHARE * env.memory_available()), "four fifths of what is available")
    tightest = min(bounds, key=lambda bound: bound.room)
    total, used, reserve = map(format_size, (tightest.total, tightest.used, tightest.reserve))
    reason = f"{tightest.name} has {total}: {used} in use, {reserve} kept free"
    return AutoBudget(max(0, tightest.room + cgroups.own_memory(root)), reason)


def make_plan(
    demand: Demand, budget: int | None, chunk: int | None = None, slots: int | None = None
) -> MemoryPlan:
    """Split `budget` (None: auto_budget()); `chunk` and `slots` fix what is otherwise chosen.

    Raises BudgetError naming the smallest budget that would work.
    """
    process = env.current_memory() + RESERVE_NBYTES + PROMPT_TOKEN_NBYTES * demand.context
    fixed = process + demand.resident_nbytes + demand.state_nbytes
    smallest_chunk = chunk or CHUNKS[-1]
    slots = None if slots is None else min(slots, demand.experts)  # more could never be filled
    wanted = slots if slots is not None else demand.min_slots
    smallest = fixed + demand.workspace_nbytes(smallest_chunk) + wanted * demand.record_nbytes
    auto = auto_budget() if budget is None else None
    limit = auto.nbytes if auto is not None else budget or 0
    if limit < smallest:
        named = -(-(smallest + _NAMED_SLACK_NBYTES) // (1 << 20))
        why = "" if auto is None else f" ({auto.reason})"
        raise BudgetError(
            f"a memory budget of {format_size(limit)}{why} is too small: the smallest that works is "
            f"--memory {named}MiB (at --context {demand.context}; a shorter context needs less)"
        )
    chunk = chunk or _choose_chunk(demand, limit - fixed)
    workspace = demand.workspace_nbytes(chunk)
    if slots is None:
        slots = demand.experts
        if demand.record_nbytes:
            slots = min(slots, (limit - fixed - workspace) // demand.record_nbytes)
    left = limit - fixed - workspace - slots * demand.record_nbytes
    embedding = slots == demand.experts and 0 < demand.embedding_nbytes <= left
    return MemoryPlan(
        budget_nbytes=limit,
        process_nbytes=process,
        resident_nbytes=demand.resident_nbytes + embedding * demand.embedding_nbytes,
        state_nbytes=demand.state_nbytes,
        workspace_nbytes=workspace,
        record_nbytes=demand.record_nbytes,
        slots=slots,
        experts=demand.experts,
        prefill_chunk=chunk,
        context=demand.context,
        embedding_resident=embedding,
        kv_cache=demand.kv_cache,
        sequences=demand.sequences,
        budget_reason="" if auto is None else auto.reason,
    )


def _choose_chunk(demand: Demand, left: int) -> int:
    """The largest chunk whose scratch memory stays a small share of what the slots could have."""
    pool = demand.min_slots * demand.record_nbytes
    everything = demand.experts * demand.record_nbytes
    for chunk in CHUNKS:
        workspace = demand.workspace_nbytes(chunk)
        if chunk >= 2 * demand.context:  # a shorter one holds the longest prompt just as well
            continue
        if workspace + everything <= left or (
            workspace + pool <= left and workspace <= _WORKSPACE_SHARE * left
        ):
            return chunk
    return CHUNKS[-1]
