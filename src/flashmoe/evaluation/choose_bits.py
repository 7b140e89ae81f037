"""Which parts get how many bits under a size: the least divergence for the bytes that must be saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from flashmoe.errors import ConfigError
from flashmoe.types import format_size


@dataclass(frozen=True, order=True)
class Option:
    """One number of bits of a unit: its bytes, and the divergence that it alone brings."""

    bits: int
    nbytes: int
    kl: float


@dataclass(frozen=True)
class Choice:
    """bits: by unit.  nbytes: of all units.  kl: the sum of what each brings alone, an estimate of the whole."""

    bits: Mapping[str, int]
    nbytes: int
    kl: float


def choose(options: Mapping[str, Sequence[Option]], most_nbytes: int) -> Choice:
    """Save bytes where they cost the least divergence a byte, until at most ``most_nbytes`` are left.

    Each unit goes down the lower convex hull of its options, so that a cheap step behind a dear one counts; the steps
    of all units are taken in the order of their price (the greedy that solves the relaxed knapsack problem; units
    and bits break ties).  Raises ConfigError when even the fewest bits are too many bytes.
    """
    hulls = {unit: _hull(found) for unit, found in options.items()}
    steps = sorted(
        ((low.kl - high.kl) / (high.nbytes - low.nbytes), unit, high, low)
        for unit, hull in hulls.items()
        for high, low in pairwise(hull)
    )
    chosen = {unit: hull[0] for unit, hull in hulls.items()}
    total = sum(option.nbytes for option in chosen.values())
    for _, unit, _, low in steps:
        if total <= most_nbytes:
            break
        total += low.nbytes - chosen[unit].nbytes
        chosen[unit] = low
    if total > most_nbytes:
        raise ConfigError(
            f"the fewest bits still need {format_size(total)}, {format_size(most_nbytes)} were asked for: "
            "give a larger --target-size"
        )
    bits = {unit: option.bits for unit, option in chosen.items()}
    return Choice(bits, total, sum(option.kl for option in chosen.values()))


def _hull(options: Sequence[Option]) -> list[Option]:
    """From the most bytes down: only options that none with fewer bytes beats, at rising prices a byte."""
    hull: list[Option] = []
    best = float("inf")
    for option in sorted(options, key=lambda o: (o.nbytes, o.kl)):
        if option.kl >= best:  # more bytes and no better
            continue
        best = option.kl
        while len(hull) > 1 and _price(hull[-1], option) >= _price(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull[::-1]


def _price(low: Option, high: Option) -> float:
    """Divergence for each byte saved."""
    return (low.kl - high.kl) / (high.nbytes - low.nbytes)
