"""Replaying a routing trace through the store's own replacement policies, without reading anything.

Event-atomic: all experts that one step asks of one layer are one event, as in the live store.  Single accesses instead
would inflate the misses of recency policies by more than a quarter (arXiv 2608.07911).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashmoe.errors import ConfigError
from flashmoe.store.policies.base import Policy
from flashmoe.store.policies.belady import Belady
from flashmoe.store.policies.layered import Layered
from flashmoe.store.policies.registry import Geometry, LayerPolicies, policy_maker
from flashmoe.store.trace import Trace

Steps = list[list[list[int]]]  # step -> layer index -> its experts
BELADY, BYPASS = "belady", "belady-bypass"
POOLS = ("layer", "shared")


@dataclass(frozen=True)
class Setting:
    """How to replay.

    slots: experts in memory for each layer (pool "layer": fixed shares; "shared": layers times as many for all).
    cold: an empty cache for each sequence; otherwise it goes on.
    """

    slots: int
    pool: str = "layer"
    cold: bool = False


@dataclass(frozen=True)
class Outcome:
    """hits, asked: int [steps, layers], experts of each event that were in memory, and all of them."""

    hits: NDArray[np.int32]
    asked: NDArray[np.int32]

    @property
    def hit_rate(self) -> float:
        """Share of all experts asked for."""
        return float(self.hits.sum() / self.asked.sum())


@dataclass(frozen=True)
class Material:
    """A trace made ready: steps, and the ranges of them that belong together."""

    layers: tuple[int, ...]
    steps: Steps
    firsts: NDArray[np.intp]  # index of each step's first token
    sequences: list[tuple[int, int]]  # [first step, end) of each run of one sequence

    @classmethod
    def of(cls, trace: Trace) -> Material:
        """Of the decoded tokens of a trace."""
        firsts, steps = [], []
        for first, experts in trace.events():
            firsts.append(first)
            steps.append(experts)
        index = np.array(firsts, np.intp)
        begins = np.searchsorted(index, trace.sequence_starts()).tolist()
        begins = sorted(set(begins))
        return cls(trace.layers, steps, index, list(zip(begins, [*begins[1:], len(steps)], strict=True)))


def replay(
    material: Material, spec: str | Callable[[], LayerPolicies], setting: Setting, geometry: Geometry
) -> Outcome:
    """Replay all steps under a policy: a name of the registry, BELADY, BYPASS, or what makes one.

    Raises ConfigError for unknown names and pools too small for one step, TraceError for a policy's file.
    """
    layers = len(material.layers)
    hits = np.zeros((len(material.steps), layers), np.int32)
    asked = np.array([[len(experts) for experts in step] for step in material.steps], np.int32)
    capacity = setting.slots * (layers if setting.pool == "shared" else 1)
    if int(asked.max()) > capacity:
        raise ConfigError(
            f"--slots {setting.slots} cannot hold one step's {int(asked.max())} experts: give more"
        )
    ranges = material.sequences if setting.cold else [(0, len(material.steps))]
    make = policy_maker(spec, geometry) if isinstance(spec, str) and spec not in (BELADY, BYPASS) else spec
    for begin, end in ranges:
        steps = material.steps[begin:end]
        policies = _policies(make, material.layers, steps, setting.pool)
        _run(steps, material.layers, policies, capacity, hits[begin:end], bypass=spec == BYPASS)
    return Outcome(hits, asked)


def _policies(
    make: str | Callable[[], LayerPolicies], layers: tuple[int, ...], steps: Steps, pool: str
) -> list[Policy]:
    """For each layer the policy that it belongs to: one of its own, or the same for all."""
    if isinstance(make, str):
        if pool == "shared":
            together: Policy = Belady(list(_events(steps, layers)))
            return [together] * len(layers)
        return [Belady([(layer, step[i]) for step in steps]) for i, layer in enumerate(layers)]
    fresh = make()
    if pool == "shared":
        return [fresh.together()] * len(layers)
    return [Layered(fresh.layer, fresh.refresh) for _ in layers]


def _events(steps: Steps, layers: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    for step in steps:
        yield from zip(layers, step, strict=True)


def _run(
    steps: Steps,
    layers: Sequence[int],
    policies: list[Policy],
    capacity: int,
    hits: NDArray[np.int32],
    *,
    bypass: bool,
) -> None:
    """Do to the policies what the cache does; hits [steps, layers] is filled in.

    bypass: what a step reads need not stay; the pool is brought to its size after the step's event.
    """
    resident: dict[int, set[int]] = {layer: set() for layer in layers}
    shared = policies[0] is policies[-1] and len(layers) > 1
    total = 0
    for step, row in zip(steps, hits, strict=True):
        for i, experts in enumerate(step):
            layer, policy = layers[i], policies[i]
            mine = resident[layer]
            policy.touch(layer, experts)
            missing = [expert for expert in experts if expert not in mine]
            row[i] = len(experts) - len(missing)
            if not missing:
                continue
            size = total if shared else len(mine)
            over = size + len(missing) - capacity
            if over > 0 and not bypass:
                _evict(policy, layer, set(experts), over, resident)
            for expert in missing:
                policy.insert(layer, expert)
            mine.update(missing)
            if over > 0 and bypass:
                _evict(policy, layer, set(), over, resident)
            total += len(missing) - max(0, over)


def _evict(policy: Policy, layer: int, keep: set[int], count: int, resident: dict[int, set[int]]) -> None:
    for _ in range(count):
        victim = policy.victim(layer, keep)
        assert victim is not None, "a pool that holds one step's experts always has a victim"
        policy.remove(*victim)
        resident[victim[0]].remove(victim[1])
