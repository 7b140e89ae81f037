"""How fast a model would run here: a few formulas over the machine's rates and the model's sizes (docs/plan.md).

Pure: no clock, no file, no weights.  All times in seconds, sizes in bytes, rates per second.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from flashmoe.engine.experts import READ_ON_SHARE
from flashmoe.engine.lookahead import AHEAD, reads_ahead
from flashmoe.store.sizes import staging_slots

F64 = NDArray[np.float64]

# The two ends of what a router may do.  1.05 reproduces the hit rates of LRU on 25,600 recorded decode steps of
# OLMoE-1B-7B (200 prompts, four domains) within 0.045; three short traces of models with 128 experts ask for 1.25.
UNIFORM, SKEWED = 0.0, 1.05
# What the engine reaches of each rate that is measured alone (docs/plan.md has the measurements behind them).
MEMORY_SHARE = 0.85
DRIVE_SHARE = 0.97  # two cores that compute delay the threads that read
PRODUCT_SHARE = 0.45
FLOAT_SHARE = 0.75
# A vector register holds 64 products of bytes, or 16 multiply-adds of floats.
FLOAT_COST = 4
# Python and the store's books, for each layer and for each read; hidden while the drive is what one waits for.
LAYER_SECONDS = 100e-6
READ_SECONDS = 50e-6
# Share of the experts guessed for the next layer that it then asks for.
FORESIGHT = 0.9


@dataclass(frozen=True)
class Machine:
    """Measured rates.

    batches: (reads of a record issued together, seconds until all have landed), ascending.  stream: bytes a second
    with the store's queue always full; fill: the same into memory that nobody has touched yet.  memory: bytes a
    second that all threads read; products: their int8 multiply-adds a second.
    """

    batches: tuple[tuple[int, float], ...]
    stream: float
    fill: float
    memory: float
    products: float

    def read_seconds(self, reads: float) -> float:
        """Time of `reads` records issued together, between and beyond the measured batches in straight lines."""
        points = [(0, 0.0), *self.batches]
        last, seconds = points[-1]
        if reads >= last:
            return seconds * reads / last / DRIVE_SHARE
        counts, times = zip(*points, strict=True)
        return float(np.interp(reads, counts, times)) / DRIVE_SHARE

    def with_drive(self, factor: float) -> Machine:
        """The same machine with a drive so many times as fast."""
        batches = tuple((reads, seconds / factor) for reads, seconds in self.batches)
        return replace(self, batches=batches, stream=self.stream * factor, fill=self.fill * factor)


@dataclass(frozen=True)
class Work:
    """Bytes that must be read from memory, int8 and float multiply-adds."""

    nbytes: float = 0.0
    products: float = 0.0
    floats: float = 0.0

    def plus(self, other: Work, times: float = 1.0) -> Work:
        """This and `times` the other."""
        return Work(
            self.nbytes + times * other.nbytes,
            self.products + times * other.products,
            self.floats + times * other.floats,
        )

    def memory_seconds(self, machine: Machine) -> float:
        """If only memory counted."""
        return self.nbytes / (machine.memory * MEMORY_SHARE)

    def compute_seconds(self, machine: Machine) -> float:
        """If only arithmetic counted."""
        floats = FLOAT_COST * self.floats / FLOAT_SHARE
        return (self.products / PRODUCT_SHARE + floats) / machine.products

    def seconds(self, machine: Machine) -> float:
        """The roofline: the larger of the two."""
        return max(self.memory_seconds(machine), self.compute_seconds(machine))


@dataclass(frozen=True)
class ModelWork:
    """One token's work: `dense` over all layers (mixers, routers, states), `shared` experts likewise, one routed
    `expert`, the output `head`, and what each `position` before the token adds.

    layers: all of them, for the time that Python takes; those with experts where not said.
    """

    expert_layers: int
    experts: int  # of a layer
    per_token: int
    record_nbytes: int
    dense: Work
    shared: Work
    expert: Work
    head: Work
    position: Work
    layers: int = 0

    @property
    def python_seconds(self) -> float:
        """What Python takes for a pass through all layers."""
        return LAYER_SECONDS * max(self.layers, self.expert_layers, 1)


@dataclass(frozen=True)
class Speed:
    """Tokens a second, and what each resource is busy for (seconds: a token's in decode, the prompt's in prefill).

    hit_rate and read_nbytes (a token's, or the prompt's) belong to the same time.
    """

    tok_s: float
    hit_rate: float
    read_nbytes: float
    drive_seconds: float
    memory_seconds: float
    compute_seconds: float

    @property
    def bound_by(self) -> str:
        """The resource that is busy longest: "drive", "memory" or "compute"."""
        busy = {"drive": self.drive_seconds, "memory": self.memory_seconds, "compute": self.compute_seconds}
        return max(busy, key=lambda name: busy[name])


def popularity(experts: int, per_token: int, skew: float) -> F64:
    """Probability [experts] that a token picks each expert: min(1, c * rank^-skew), summing to `per_token`.

    0 is uniform.  The same law as `flashmoe synth --router-skew`.
    """
    ranks = np.arange(1, experts + 1, dtype=np.float64) ** -skew
    if not experts:
        return ranks
    low, high = 0.0, per_token * experts / ranks.sum() * experts**skew
    for _ in range(100):
        middle = (low + high) / 2
        if np.minimum(1.0, middle * ranks).sum() < per_token:
            low = middle
        else:
            high = middle
    picks: F64 = np.minimum(1.0, high * ranks)
    return picks


def hit_rate(picks: F64, slots: float) -> float:
    """Share of picks found in a layer's `slots` by LRU.

    Che's approximation (Che, Tung and Wang 2002): an expert is resident if it was picked in the last t tokens, and
    t is such that `slots` of them are.  Exact for a uniform router: slots / experts.  Fewer slots than one token
    picks hold a part of what the last token picked.
    """
    if slots >= len(picks):
        return 1.0
    step = float(picks.sum())
    if slots < step:
        return slots / step * float((picks * picks).sum()) / step
    return float((picks * residency(picks, slots)).sum()) / step


def residency(picks: F64, slots: float) -> F64:
    """Probability [experts] that each expert is in a layer's `slots` filled ones: see hit_rate."""
    if slots >= len(picks):
        return np.ones_like(picks)
    low, high = 0.0, 1.0
    while _picked(picks, high).sum() < slots:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        if _picked(picks, middle).sum() < slots:
            low = middle
        else:
            high = middle
    return _picked(picks, high)


def decode(machine: Machine, model: ModelWork, slots: int, skew: float, position: int = 0) -> Speed:
    """The steady speed of one token after another with `slots` filled slots and `position` tokens before it."""
    layers = max(model.expert_layers, 1)
    picks = popularity(model.experts, model.per_token, skew)
    hits = hit_rate(picks, slots / layers)
    dense = model.dense.plus(model.position, position)
    steps = dense.plus(model.shared).plus(model.expert, layers * model.per_token)
    before = (dense.seconds(machine) + model.python_seconds) / layers
    seconds = model.head.seconds(machine)
    reads_seconds = 0.0
    ahead = AHEAD if reads_ahead(slots, model.per_token) else 0
    for misses, probability in _misses(model.per_token, 1 - hits):
        expert = model.expert.seconds(machine)
        compute = before + model.shared.seconds(machine) / layers + model.per_token * expert
        compute += misses * READ_SECONDS
        tail = expert if misses else 0.0
        blind = machine.read_seconds(misses) + before + tail  # nobody foresees the first layer
        guessed = min(ahead, misses)
        # Of wrong guesses the one that has begun when the layer asks; the others are taken back.
        reads = machine.read_seconds(misses + (1 - FORESIGHT) * min(guessed, 1))
        idle = max(0.0, before + tail - machine.read_seconds(FORESIGHT * guessed))
        seconds += probability * max(compute, blind)
        seconds += probability * (layers - 1) * max(compute, reads + idle)
        reads_seconds += probability * layers * reads
    total = steps.plus(model.head)
    missed = (1 - hits) * model.per_token * layers * model.record_nbytes
    busy = total.memory_seconds(machine), total.compute_seconds(machine)
    return Speed(1 / seconds, hits, missed, reads_seconds, *busy)


def prefill(
    machine: Machine, model: ModelWork, slots: int, skew: float, tokens: int, chunk: int, filled: bool = False
) -> Speed:
    """A prompt of `tokens` tokens, taken `chunk` at a time: a first one with an empty pool, or with a filled one.

    Each expert that a chunk needs is visited once.  Reads overlap with the experts' products, and with the next layer's
    mixer when a layer needs nearly all of its experts: as many of them as staging slots hold.
    """
    picks = popularity(model.experts, model.per_token, skew)
    everything = model.expert_layers * model.experts
    staging = staging_slots(slots) * model.record_nbytes / (machine.stream * DRIVE_SHARE)
    missing = np.ones_like(picks)  # probability that an expert is not in a slot
    if filled and everything:
        missing -= residency(picks, slots / model.expert_layers)
    asked = kept = reads_total = seconds = drive_seconds = 0.0
    total = Work()
    for begin in range(0, tokens, chunk):
        count = min(chunk, tokens - begin)
        wanted = _picked(picks, count)
        needed = model.expert_layers * float(wanted.sum())
        reads = model.expert_layers * float((wanted * missing).sum())
        reads *= 1 - kept / everything if everything else 0.0
        fresh = 0.0 if filled else min(reads, slots - kept)
        drive = fresh * model.record_nbytes / machine.fill
        drive += (reads - fresh) * model.record_nbytes / machine.stream
        drive /= DRIVE_SHARE
        dense = _dense_of(model, begin, count)
        experts = _experts_of(model, needed, count)
        mixers = dense.seconds(machine) + model.python_seconds
        idle = mixers
        if needed >= READ_ON_SHARE * everything:
            idle = max(0.0, mixers - model.expert_layers * staging)
        seconds += max(drive + idle, mixers + experts.seconds(machine) + reads * READ_SECONDS)
        kept += fresh
        asked, reads_total, drive_seconds = asked + needed, reads_total + reads, drive_seconds + drive
        total = total.plus(dense).plus(experts)
    total = total.plus(model.head)
    seconds += model.head.seconds(machine)
    hits = 1 - reads_total / asked if asked else 1.0
    busy = total.memory_seconds(machine), total.compute_seconds(machine)
    return Speed(tokens / seconds, hits, reads_total * model.record_nbytes, drive_seconds, *busy)


def _picked(picks: F64, tokens: float) -> F64:
    """Probability that each expert is picked by at least one of so many tokens."""
    return 1 - (1 - picks) ** tokens


def _misses(per_token: int, miss_rate: float) -> Iterator[tuple[int, float]]:
    """(misses of one layer, probability): independent picks."""
    for misses in range(per_token + 1):
        ways = math.comb(per_token, misses)
        yield misses, ways * miss_rate**misses * (1 - miss_rate) ** (per_token - misses)


def _dense_of(model: ModelWork, begin: int, count: int) -> Work:
    """Mixers, routers and shared experts of `count` tokens from position `begin` on: weights are read once."""
    each = model.dense.plus(model.shared)
    positions = count * begin + count * (count - 1) / 2
    floats = count * each.floats + positions * model.position.floats
    return Work(each.nbytes + (begin + count) * model.position.nbytes, count * each.products, floats)


def _experts_of(model: ModelWork, needed: float, count: int) -> Work:
    """Routed experts of `count` tokens that need so many records: each is read from memory once."""
    pairs = count * model.per_token * model.expert_layers
    return Work(needed * model.expert.nbytes, pairs * model.expert.products, pairs * model.expert.floats)
