"""The forecast's limits: what it must say where the answer is known without it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from flashmoe.engine.forecast import (
    DRIVE_SHARE,
    FORESIGHT,
    LAYER_SECONDS,
    MEMORY_SHARE,
    PRODUCT_SHARE,
    READ_SECONDS,
    SKEWED,
    UNIFORM,
    Machine,
    ModelWork,
    Work,
    decode,
    hit_rate,
    popularity,
    prefill,
)
from flashmoe.store.policies import LayeredLru

LAYERS, EXPERTS, K, RECORD = 10, 64, 4, 1_000_000
ALL = LAYERS * EXPERTS
MODEL = ModelWork(
    expert_layers=LAYERS,
    experts=EXPERTS,
    per_token=K,
    record_nbytes=RECORD,
    dense=Work(200e6, 350e6, 5e6),
    shared=Work(10e6, 18e6),
    expert=Work(RECORD, 1.8e6),
    head=Work(100e6, 180e6),
    position=Work(2000, 0, 1000),
)


def machine(drive: float = 2e9, memory: float = 30e9, products: float = 400e9) -> Machine:
    batches = tuple((n, n * RECORD / drive) for n in (1, 2, 4, 8))
    return Machine(batches, drive, drive, memory, products)


TOKEN = MODEL.dense.plus(MODEL.shared).plus(MODEL.head).plus(MODEL.expert, K * LAYERS)


def test_all_resident_is_bound_by_memory() -> None:
    for drive in (1e6, 1e12):
        speed = decode(machine(drive), MODEL, ALL, UNIFORM)
        assert (speed.hit_rate, speed.read_nbytes, speed.drive_seconds) == (1.0, 0.0, 0.0)
        assert speed.bound_by == "memory"
        expected = TOKEN.nbytes / (30e9 * MEMORY_SHARE) + LAYERS * LAYER_SECONDS
        assert 1 / speed.tok_s == pytest.approx(expected)


def test_a_slow_processor_is_bound_by_compute() -> None:
    speed = decode(machine(products=1e9), MODEL, ALL, UNIFORM)
    assert speed.bound_by == "compute"
    assert speed.tok_s < 1e9 * PRODUCT_SHARE / TOKEN.products


def test_without_hits_the_drive_is_all_that_counts() -> None:
    speed = decode(machine(drive=1e7), MODEL, 0, UNIFORM)
    assert (speed.hit_rate, speed.bound_by) == (0.0, "drive")
    assert speed.read_nbytes == K * LAYERS * RECORD
    assert speed.tok_s == pytest.approx(1e7 * DRIVE_SHARE / speed.read_nbytes, rel=0.02)


def test_never_faster_than_the_drive_or_the_memory_alone() -> None:
    for slots in range(0, ALL + 1, 40):
        for drive in (3e8, 3e9, 3e10):
            for skew in (UNIFORM, SKEWED):
                speed = decode(machine(drive), MODEL, slots, skew)
                assert speed.tok_s * speed.read_nbytes <= drive
                assert speed.tok_s * TOKEN.nbytes <= 30e9


def test_faster_with_more_slots_a_better_machine_or_a_more_uneven_router() -> None:
    """Slots below the pool that reads ahead are left out: reading ahead costs reads and hides time."""
    ladder = [decode(machine(), MODEL, slots, UNIFORM).tok_s for slots in range(4 * K, ALL + 1, 16)]
    assert all(low < high for low, high in pairwise(ladder))
    rates = np.geomspace(1e8, 1e11, 30)
    for ladder in (
        [decode(machine(drive=rate), MODEL, 200, UNIFORM).tok_s for rate in rates],
        [decode(machine(memory=rate), MODEL, 200, UNIFORM).tok_s for rate in rates],
        [prefill(machine(drive=rate), MODEL, 200, UNIFORM, 300, 64).tok_s for rate in rates],
        [prefill(machine(products=rate), MODEL, 200, UNIFORM, 300, 64).tok_s for rate in rates],
        [decode(machine(), MODEL, 200, skew).tok_s for skew in (0.0, 0.5, 1.0, 1.5)],
    ):
        assert all(low <= high for low, high in pairwise(ladder))
        assert ladder[0] < ladder[-1]


def test_a_longer_context_is_slower() -> None:
    speeds = [decode(machine(), MODEL, ALL, UNIFORM, position).tok_s for position in (0, 4096, 65536)]
    assert speeds == sorted(speeds, reverse=True)
    extra = 1 / speeds[2] - 1 / speeds[0]
    assert extra == pytest.approx(65536 * 2000 / (30e9 * MEMORY_SHARE))


def test_reading_ahead_hides_the_time_between_layers() -> None:
    """One layer more, drive-bound: its reads, a few wasted ones, and none of its own arithmetic."""
    slow = machine(drive=1e9)
    one_more = replace(
        MODEL,
        expert_layers=LAYERS + 1,
        dense=Work(MODEL.dense.nbytes * (LAYERS + 1) / LAYERS),
        shared=Work(MODEL.shared.nbytes * (LAYERS + 1) / LAYERS),
    )
    least = 4 * K  # slots
    base = replace(MODEL, dense=Work(MODEL.dense.nbytes), shared=Work(MODEL.shared.nbytes))
    added = 1 / decode(slow, one_more, least, UNIFORM).tok_s - 1 / decode(slow, base, least, UNIFORM).tok_s
    assert added == pytest.approx(slow.read_seconds(K + 1 - FORESIGHT), rel=0.03)
    blind = decode(slow, base, least - 1, UNIFORM)
    assert 1 / blind.tok_s > 1 / decode(slow, base, least, UNIFORM).tok_s + 5e-4 * LAYERS


def test_the_drive_curve_is_followed() -> None:
    curve = Machine(((1, 3.0), (2, 4.0), (4, 8.0)), 1.0, 1.0, 1.0, 1.0)
    seconds = [curve.read_seconds(reads) * DRIVE_SHARE for reads in (0, 0.5, 1, 1.5, 2, 3, 4, 8)]
    assert seconds == pytest.approx([0, 1.5, 3, 3.5, 4, 6, 8, 16])


@pytest.mark.parametrize("skew", [0.0, 0.7, 1.05, 3.0])
@pytest.mark.parametrize(("experts", "k"), [(64, 8), (512, 10), (8, 8), (5, 1)])
def test_popularity_is_a_law_of_k_picks(experts: int, k: int, skew: float) -> None:
    picks = popularity(experts, k, skew)
    assert picks.sum() == pytest.approx(k)
    assert picks.max() <= 1
    assert np.all(np.diff(picks) <= 0)
    if not skew:
        assert picks == pytest.approx(np.full(experts, k / experts))


def test_a_uniform_router_hits_by_the_share_of_slots() -> None:
    picks = popularity(256, 8, UNIFORM)
    for slots in (0, 1, 8, 31.5, 128, 255, 256, 300):
        assert hit_rate(picks, slots) == pytest.approx(min(slots / 256, 1.0), abs=1e-6)


@pytest.mark.parametrize("slots", [16, 24, 48])
def test_hit_rates_are_those_of_the_policy(slots: int) -> None:
    """Che's approximation beside the policy itself, on picks drawn from the same law."""
    rng, policy = np.random.default_rng(0), LayeredLru()
    picks = popularity(64, 8, SKEWED)
    resident: set[int] = set()
    hits = asked = 0
    for step in range(3000):
        wanted = [int(expert) for expert in np.flatnonzero(rng.random(64) < picks)]
        if step >= 500:
            hits += len(resident.intersection(wanted))
            asked += len(wanted)
        policy.touch(0, wanted)
        for expert in set(wanted) - resident:
            if len(resident) >= slots:
                victim = policy.victim(0, set(wanted)) or policy.victim(0, set())
                assert victim is not None
                policy.remove(*victim)
                resident.remove(victim[1])
            policy.insert(0, expert)
            resident.add(expert)
    assert hit_rate(picks, slots) == pytest.approx(hits / asked, abs=0.02)


def test_a_prompt_reads_each_needed_expert_once_a_chunk() -> None:
    nothing = ALL * RECORD
    one_chunk = prefill(machine(), MODEL, 16, UNIFORM, 4096, 4096)
    assert one_chunk.read_nbytes == pytest.approx(nothing)
    assert one_chunk.hit_rate == 0
    all_fit = prefill(machine(), MODEL, ALL, UNIFORM, 4096, 2048)
    assert all_fit.read_nbytes == pytest.approx(nothing)
    assert all_fit.hit_rate == pytest.approx(0.5)
    half = prefill(machine(), MODEL, ALL // 2, UNIFORM, 4096, 2048)
    assert half.read_nbytes == pytest.approx(1.5 * nothing)
    few = prefill(machine(), MODEL, 16, UNIFORM, 1, 2048)
    assert few.read_nbytes == pytest.approx(K * LAYERS * RECORD)


def test_prefill_overlaps_reads_with_products() -> None:
    fast = prefill(machine(drive=1e15), MODEL, 16, UNIFORM, 1024, 1024)
    slow = prefill(machine(drive=1e7), MODEL, 16, UNIFORM, 1024, 1024)
    assert (fast.bound_by, slow.bound_by) == ("compute", "drive")
    work = fast.compute_seconds + LAYERS * LAYER_SECONDS + ALL * READ_SECONDS
    assert 1024 / fast.tok_s == pytest.approx(work, rel=0.02)
    assert 1024 / slow.tok_s == pytest.approx(slow.drive_seconds, rel=1e-3), "the mixers are hidden too"


def test_prefill_reads_on_only_if_a_layer_needs_nearly_all_and_as_far_as_staging_goes() -> None:
    short = prefill(machine(drive=1e8), MODEL, 16, UNIFORM, 2, 2048)
    mixers = MODEL.dense.plus(MODEL.shared).seconds(machine()) + LAYERS * LAYER_SECONDS
    assert 2 / short.tok_s == pytest.approx(
        short.drive_seconds + mixers + MODEL.head.seconds(machine()), rel=1e-3
    )
    slow_mixers = replace(MODEL, dense=Work(1e6, 4e9))
    small, large = (prefill(machine(), slow_mixers, slots, UNIFORM, 64, 64) for slots in (16, 300))
    saved = LAYERS * (37 - 8) * RECORD / (2e9 * DRIVE_SHARE)  # an eighth of 300 slots, half of 16
    assert 64 / small.tok_s - 64 / large.tok_s == pytest.approx(saved)


def test_memory_that_is_touched_first_is_filled_at_its_own_rate() -> None:
    slow_fill = replace(machine(drive=1e8), fill=1e7)
    seconds = prefill(slow_fill, MODEL, 100, UNIFORM, 1024, 1024).drive_seconds
    assert seconds * DRIVE_SHARE == pytest.approx(100 * RECORD / 1e7 + (ALL - 100) * RECORD / 1e8)


def test_a_model_without_routed_experts_has_a_speed() -> None:
    dense = ModelWork(0, 64, 4, 0, Work(1e8, 2e8), Work(), Work(), Work(1e7, 2e7), Work())
    idle = Machine(((1, 0.0),), float("inf"), float("inf"), 30e9, 4e11)
    assert decode(idle, dense, 0, UNIFORM).tok_s > 0
    assert prefill(idle, dense, 0, UNIFORM, 100, 16).tok_s > 0


def test_a_filled_pool_is_not_read_again() -> None:
    """With an even router its share of all experts; else the favourites, which a short prompt asks for."""
    half = prefill(machine(), MODEL, ALL // 2, UNIFORM, 1024, 1024, filled=True)
    assert half.read_nbytes == pytest.approx(ALL // 2 * RECORD, rel=0.01)
    assert half.hit_rate == pytest.approx(0.5, abs=0.01)
    assert half.tok_s > prefill(machine(), MODEL, ALL // 2, UNIFORM, 1024, 1024).tok_s
    short = [
        prefill(machine(), MODEL, ALL // 2, skew, 8, 8, filled=True).hit_rate for skew in (UNIFORM, SKEWED)
    ]
    assert short[1] > short[0] + 0.15
    everything = prefill(machine(), MODEL, ALL, SKEWED, 1024, 256, filled=True)
    assert (everything.hit_rate, everything.read_nbytes) == (1.0, 0.0)
