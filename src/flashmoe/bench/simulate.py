"""Replays of several policies at several pool sizes, beside LRU and Belady's bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashmoe.bench.replay import BELADY, BYPASS, Material, Outcome, Setting, replay
from flashmoe.store.policies.registry import Geometry
from flashmoe.store.trace import Trace

BASE = "lru"  # what the gap to the bound is measured from
Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Drive:
    """What a projection of speed needs: bytes of a record, bytes per second, and seconds of computing a token."""

    record_nbytes: int
    rate: float
    compute_seconds: float = 0.0

    def tokens_per_second(self, misses_per_token: float) -> float:
        """An upper bound: reading and computing overlap perfectly."""
        seconds = max(misses_per_token * self.record_nbytes / self.rate, self.compute_seconds)
        return 1 / seconds if seconds > 0 else float("inf")


@dataclass(frozen=True)
class Plan:
    """Which replays to make; policies are names of the registry, BELADY or BYPASS."""

    policies: Sequence[str]
    slots: Sequence[int]
    pool: str = "layer"
    cold: bool = False
    drive: Drive | None = None


def simulate(
    trace: Trace, plan: Plan, progress: Progress = lambda policy, slots: None
) -> list[dict[str, Any]]:
    """One row (JSON values) for each policy and pool size: the asked for ones, LRU and both bounds.

    hit_rate; gap_closed: of the way from LRU's to Belady's hit rate; by_domain, by_layer: hit rates.  Raises what
    replay() raises.
    """
    trace = trace.decoding()
    material = Material.of(trace)
    geometry = Geometry(trace.layers, trace.experts)
    names = list(dict.fromkeys([BASE, *plan.policies, BELADY, BYPASS]))
    rows = []
    for slots in plan.slots:
        setting = Setting(slots, plan.pool, plan.cold)
        outcomes: dict[str, Outcome] = {}
        for name in names:
            progress(name, slots)
            outcomes[name] = replay(material, name, setting, geometry)
        low, high = outcomes[BASE].hit_rate, outcomes[BELADY].hit_rate
        for name, outcome in outcomes.items():
            rows.append(_row(name, slots, outcome, low, high, trace, material, plan.drive))
    return rows


def _row(
    name: str,
    slots: int,
    outcome: Outcome,
    low: float,
    high: float,
    trace: Trace,
    material: Material,
    drive: Drive | None,
) -> dict[str, Any]:
    misses = int((outcome.asked - outcome.hits).sum()) / trace.tokens
    row: dict[str, Any] = {
        "policy": name,
        "slots": slots,
        "hit_rate": outcome.hit_rate,
        "gap_closed": (outcome.hit_rate - low) / (high - low) if high > low else None,
        "misses_per_token": misses,
        "by_layer": dict(
            zip(trace.layers, (outcome.hits.sum(0) / outcome.asked.sum(0)).tolist(), strict=True)
        ),
    }
    if trace.domains is not None:
        domain = trace.domains[material.firsts]
        row["by_domain"] = {
            int(d): float(outcome.hits[domain == d].sum() / outcome.asked[domain == d].sum())
            for d in np.unique(domain)
        }
    if drive is not None:
        row["bytes_per_token"] = misses * drive.record_nbytes
        row["projected_tok_s"] = drive.tokens_per_second(misses)
    return row
