"""What was foretold beside what the machine does right afterwards, in a process of its own at the plan's budget."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from flashmoe.bench.stream import StreamOptions, measure_in_process
from flashmoe.engine.forecast import UNIFORM, Machine, ModelWork, decode, prefill
from flashmoe.engine.memory import MemoryPlan

WARM, TOKENS = 8, 24


def measure_plan(
    bundle: Path, plan: MemoryPlan, prompt: int, experts_per_token: int | None
) -> dict[str, Any]:
    """Decode `TOKENS` tokens with filled slots, then a prompt of `prompt` tokens; the report of bench/stream.py.

    Raises FlashmoeError with the one line that the process ended with.
    """
    options = StreamOptions(
        str(bundle), plan.budget_nbytes, WARM, TOKENS, prompt, experts_per_token=experts_per_token
    )
    return measure_in_process(options)


def compare(
    entry: dict[str, Any], machine: Machine, work: ModelWork, plan: MemoryPlan, prompt: int
) -> list[dict[str, Any]]:
    """A row for decode and one for the prompt: foretold low and high, measured, and how far off the ends are.

    off: foretold / measured - 1, so above zero the forecast was too optimistic.  same_drive_off: of the low end, had
    the drive given as much when it was measured as it gave during the run.
    """
    rows = []
    for what, speeds in (("decode", entry["decode"]), ("prefill", entry["prefill"].get(str(prompt)))):
        measured = entry["measured"].get(what)
        if speeds is None or measured is None:
            continue
        ends = {end: speeds[end]["tok_s"] for end in ("low", "high")}
        off = {f"{end}_off": tok_s / measured["tok_s"] - 1 for end, tok_s in ends.items()}
        again = _same_drive(what, measured["drive_rate"], machine, work, plan, prompt)
        rows.append(
            {"memory_bytes": entry["plan"]["budget_nbytes"], "what": what}
            | ends
            | {"measured": measured["tok_s"], "hit_rate": measured["hit_rate"]}
            | {"drive_bytes_per_second": measured["drive_rate"]}
            | off
            | {"same_drive_off": again / measured["tok_s"] - 1}
        )
    return rows


def _same_drive(
    what: str, rate: float, machine: Machine, work: ModelWork, plan: MemoryPlan, prompt: int
) -> float:
    """The low end with the drive's rates in proportion, so that it gives `rate` as it is read in a run."""
    if what == "prefill":
        then = machine.with_drive(rate / machine.stream) if rate else machine
        return prefill(then, work, plan.slots, UNIFORM, prompt, plan.prefill_chunk, filled=True).tok_s
    together = [reads * work.record_nbytes / seconds for reads, seconds in machine.batches if seconds]
    then = machine.with_drive(rate / median(together)) if rate and together else machine
    return decode(then, work, plan.slots, UNIFORM).tok_s
