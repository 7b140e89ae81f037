"""Training: what is learned helps on what was not trained on, and is the same each time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flashmoe.bench.replay import BELADY, Material, Setting, replay
from flashmoe.bench.split import part_of
from flashmoe.errors import ConfigError, TraceError
from flashmoe.learning.network import NetworkOptions, _fit_layer, _gradients, _inputs, _judged, fit_network
from flashmoe.learning.targets import NEVER, decayed, distances, use_matrix
from flashmoe.learning.train import train
from flashmoe.store.policies.flashmoe_net import FlashMoeNet
from flashmoe.store.policies.flashmoe_net import distances as predict
from flashmoe.store.policies.learned_file import KINDS, load_learned, save_learned
from flashmoe.store.policies.registry import Geometry, learned_maker, policy_maker
from flashmoe.store.trace import Trace


def hit_rates(trace: Trace, learned_kind: str, slots: int) -> tuple[float, float, float]:
    """Of LFU with decay, of what was trained, and of the bound, on sequences that were not trained on."""
    learned = train(part_of(trace, "train"), learned_kind)
    test = part_of(trace, "test")
    material, geometry = Material.of(test), Geometry(test.layers, test.experts)
    setting = Setting(slots)
    mine = replay(material, learned_maker(learned, geometry), setting, geometry)
    others = [replay(material, name, setting, geometry).hit_rate for name in ("lfu-decay", BELADY)]
    return others[0], mine.hit_rate, others[1]


def test_a_forecast_learns_what_follows_what(linked_trace: Trace) -> None:
    decay, forecast, belady = hit_rates(linked_trace, "forecast", 8)
    assert forecast > decay + 0.25 * (belady - decay)
    assert forecast <= belady


def test_the_network_beats_counting_where_order_matters(linked_trace: Trace) -> None:
    decay, network, belady = hit_rates(linked_trace, "flashmoe-net", 8)
    assert decay < network <= belady


def test_the_ranker_does_not_lose_to_counting(linked_trace: Trace) -> None:
    decay, ranked, belady = hit_rates(linked_trace, "pairwise", 8)
    assert decay - 0.01 < ranked <= belady


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_holds_what_was_trained_and_training_again_gives_the_same(
    linked_trace: Trace, tmp_path: Path, kind: str
) -> None:
    short = replace(linked_trace.select(np.arange(600)), model="abc")
    learned = train(short, kind)
    save_learned(tmp_path / "p.npz", learned)
    loaded = load_learned(tmp_path / "p.npz")
    again = train(short, kind)
    assert (loaded.kind, loaded.model, loaded.layers, loaded.experts) == (kind, "abc", (0, 1, 2), 16)
    assert loaded.about == {"trace": "linked.npz", "tokens": 600, "sequences": 2}
    for name, value in vars(loaded.weights).items():
        assert np.array_equal(value, getattr(learned.weights, name))
        assert np.array_equal(value, getattr(again.weights, name))


def test_a_policy_of_another_model_is_an_error(linked_trace: Trace, tmp_path: Path) -> None:
    save_learned(tmp_path / "p.npz", train(replace(linked_trace.select(np.arange(300)), model="abc")))
    spec = f"learned:{tmp_path / 'p.npz'}"
    assert policy_maker(spec, Geometry((0, 1, 2), 16, "abc"))
    with pytest.raises(TraceError, match=r"p\.npz: was trained for another bundle"):
        policy_maker(spec, Geometry((0, 1, 2), 16, "other"))
    with pytest.raises(TraceError, match="3 layers of 16 experts, and these are 4 of 16"):
        policy_maker(spec, Geometry((0, 1, 2, 3), 16))
    with pytest.raises(TraceError, match="train it on a trace of this model"):
        policy_maker(f"static:{tmp_path / 'p.npz'}", Geometry((0, 1, 2), 17))


def test_too_little_to_learn_from(linked_trace: Trace) -> None:
    with pytest.raises(TraceError, match="255 decoded tokens are too few"):
        train(linked_trace.select(np.arange(255)))
    with pytest.raises(ConfigError, match="unknown --kind 'oracle'"):
        train(linked_trace, "oracle")


def test_distances_count_the_steps_until_the_next_use() -> None:
    used = np.array([[1, 0], [0, 0], [1, 1], [0, 0]], np.float32)
    assert distances(used).tolist() == [[2, 2], [1, 1], [NEVER, NEVER], [NEVER, NEVER]]


def test_decayed_counts() -> None:
    used = np.array([[1, 0], [0, 1], [1, 0]], np.float32)
    assert decayed(used, 0.5).tolist() == [[1, 0], [0.5, 1], [1.25, 0.5]]
    assert decayed(used, 0).tolist() == used.tolist()


def test_gradients_of_the_network_are_those_of_its_loss() -> None:
    rng = np.random.default_rng(0)
    network = [rng.normal(size=shape) for shape in [(6, 4), (4,), (4, 4), (4,), (4, 3), (3,)]]
    x, y = rng.normal(size=(5, 6)), rng.random((5, 3))
    gradients = _gradients(x, y, network)  # type: ignore[arg-type]
    for part, gradient in zip(network, gradients, strict=True):
        for place in np.ndindex(part.shape):
            losses = []
            for step in (1e-6, -2e-6):
                part[place] += step
                losses.append(((predict(x, network) - y) ** 2).mean())  # type: ignore[arg-type]
            part[place] += 1e-6
            assert gradient[place] == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-4, abs=1e-7)


def test_the_network_learns_a_function_it_can_hold() -> None:
    rng = np.random.default_rng(1)
    x = rng.random((600, 8)).astype(np.float32)
    y = (0.5 * x[:, :2] + 0.25).astype(np.float32)
    network = _fit_layer(x, y, np.arange(600) >= 540, NetworkOptions(epochs=60))
    assert ((predict(x, network) - y) ** 2).mean() < 0.05 * y.var()


def test_the_network_is_trained_on_what_a_replay_shows_it(linked_trace: Trace) -> None:
    """History goes on from sequence to sequence, or begins anew where the cache does."""
    trace, used = linked_trace.select(np.arange(700)), use_matrix(linked_trace, 1)[:700]
    weights = fit_network(trace.select(np.arange(20)), NetworkOptions(epochs=1))
    going_on, cold = _inputs(used, set()), _inputs(used, {0, 300, 600})
    policy, fresh = FlashMoeNet(weights, 1), FlashMoeNet(weights, 1)
    for i, row in enumerate(used):
        if i % 300 == 0:
            fresh = FlashMoeNet(weights, 1)
        for one in (policy, fresh):
            one.touch(np.flatnonzero(row).tolist())
        assert np.allclose(going_on[i], policy.features(), rtol=1e-6)
        assert np.allclose(cold[i], fresh.features(), rtol=1e-6)
    assert not np.allclose(going_on, cold)


def test_early_stopping_judges_by_whole_sequences() -> None:
    begins = np.arange(0, 100, 5)
    judged = _judged(begins, 100, 0.1)
    assert judged.sum() == 10
    assert all(part.all() or not part.any() for part in judged.reshape(20, 5))
    assert np.flatnonzero(_judged(begins[:3], 100, 0.1)).tolist() == list(range(90, 100))


def test_only_the_network_may_be_trained_cold(linked_trace: Trace) -> None:
    short = linked_trace.select(np.arange(600))
    going_on, cold = (train(short, "flashmoe-net", cold=cold).weights for cold in (False, True))
    assert not np.array_equal(going_on.w1, cold.w1)  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="--cold is for --kind flashmoe-net"):
        train(short, "forecast", cold=True)
