"""Policies and traces on a running engine: recorded, replayed, trained, and never seen in a result."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from flashmoe.bench.replay import Material, Setting, replay
from flashmoe.cli import main
from flashmoe.engine.engine import Engine, EngineOptions
from flashmoe.errors import ConfigError, TraceError
from flashmoe.learning.train import train
from flashmoe.store.policies.learned_file import save_learned
from flashmoe.store.policies.registry import Geometry, chosen
from flashmoe.store.trace import DECODE, PREFILL, Trace, read_trace

TOKENS, LAYERS, EACH = 30, 30, 5  # of the demo model; slots for each layer
SLOTS = LAYERS * EACH


def decode(bundle: Path, tokens: int = TOKENS, **options: object) -> tuple[bytes, int]:
    """Fixed tokens one by one from an empty sequence: the logits' bytes, and the cache's hits."""
    settings = {"context": 512, "threads": 1, "expert_slots": SLOTS, "lookahead": "off"} | options
    with Engine.open(bundle, EngineOptions(**settings)) as engine:  # type: ignore[arg-type]
        engine.start()
        logits = [np.array(engine.feed([7 + 3 * i % 50])) for i in range(tokens)]
        return np.concatenate(logits).tobytes(), engine.cache_stats().total.hits


@pytest.fixture(scope="module")
def recorded(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    path = tmp_path_factory.mktemp("trace") / "demo.npz"
    decode(demo_bundle, 300, record_trace=path)
    return read_trace(path)


def test_a_recording_says_what_was_decoded(demo_bundle: Path, recorded: Trace) -> None:
    assert recorded.expert_ids.shape == (300, LAYERS, 4)
    assert recorded.token_ids[:3].tolist() == [7, 10, 13]
    assert set(recorded.phases.tolist()) == {DECODE}
    assert recorded.router_weights is not None
    assert np.allclose(recorded.router_weights.astype(np.float32).sum(2), 1, atol=0.01)


# Queues know who came first, which of an event's reads lands first is up to the drive: these have no queue.
@pytest.mark.parametrize("policy", ["lfu", "lfu-decay", "lru-2"])
def test_a_run_hits_what_a_replay_of_it_hits(demo_bundle: Path, recorded: Trace, policy: str) -> None:
    _, hits = decode(demo_bundle, policy=policy)
    material = Material.of(recorded.select(np.arange(TOKENS)))
    outcome = replay(material, policy, Setting(EACH, "shared"), Geometry(recorded.layers, 8))
    assert hits == outcome.hits.sum()


def test_a_bundle_runs_with_the_policy_that_it_carries(
    demo_bundle: Path, recorded: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`cache train --bundle` puts it there, and whoever opens the bundle uses it."""
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for file in demo_bundle.iterdir():
        (bundle / file.name).symlink_to(file)
    assert chosen("auto", bundle) == "duel"
    assert decode(bundle)[0] == decode(bundle, policy="duel")[0]
    trace = tmp_path / "t.npz"
    decode(bundle, 300, record_trace=trace)
    assert main(["cache", "train", str(trace), "--bundle", str(bundle)]) == 0
    assert "the bundle runs with it now" in capsys.readouterr().out
    assert decode(bundle) == decode(bundle, policy=f"learned:{bundle / 'experts.policy'}")
    assert chosen("auto", bundle) == f"learned:{bundle / 'experts.policy'}"
    assert chosen("lru", bundle) == "lru"
    assert main(["inspect", str(bundle)]) == 0
    assert "experts.policy: used unless --policy says otherwise" in capsys.readouterr().out
    assert main(["verify", str(bundle)]) == 0


@pytest.mark.parametrize("damage", ["another", "torn"])
def test_a_policy_in_the_bundle_that_does_not_fit_is_told(
    demo_bundle: Path, recorded: Trace, tmp_path: Path, damage: str
) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for file in demo_bundle.iterdir():
        (bundle / file.name).symlink_to(file)
    file = bundle / "experts.policy"
    save_learned(file, train(dataclasses.replace(recorded, model="another")))
    if damage == "torn":
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        TraceError, match=r"experts\.policy: .*; without the file the bundle runs with --policy duel"
    ):
        decode(bundle)
    decode(bundle, 2, policy="lru")


def test_a_learned_policy_changes_hits_and_no_bit(demo_bundle: Path, recorded: Trace, tmp_path: Path) -> None:
    save_learned(tmp_path / "p.npz", train(recorded))
    expected, by_lru = decode(demo_bundle, policy="lru")
    logits, hits = decode(demo_bundle, policy=f"learned:{tmp_path / 'p.npz'}")
    assert logits == expected
    assert hits != by_lru
    material = Material.of(recorded.select(np.arange(TOKENS)))
    geometry = Geometry(recorded.layers, 8)
    replayed = replay(material, f"learned:{tmp_path / 'p.npz'}", Setting(EACH, "shared"), geometry)
    assert hits == replayed.hits.sum(), "refreshing beside the reads gives what replay computes at once"


def test_prompts_and_conversations_are_told_apart(demo_bundle: Path, tmp_path: Path) -> None:
    options = EngineOptions(context=64, threads=1, sequences=2, record_trace=tmp_path / "t.npz")
    with Engine.open(demo_bundle, options) as engine:
        one, two = engine.states
        for state in engine.states:
            state.clear()
        engine.step([(one, [5, 6, 7])], [0])
        engine.step([(one, [8]), (two, [9, 10])], [0])
        engine.step([(one, [11]), (two, [12])], [0, 1])
        one.clear()
        engine.step([(one, [13, 14])], [0])
    trace = read_trace(tmp_path / "t.npz")
    assert trace.token_ids.tolist() == [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    assert trace.sequences.tolist() == [0, 0, 0, 0, 1, 1, 0, 1, 2, 2]
    assert trace.steps.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3]
    assert trace.phases.tolist() == [PREFILL] * 3 + [DECODE, PREFILL, PREFILL, DECODE, DECODE] + [PREFILL] * 2


def test_a_policy_of_another_bundle_is_an_error(demo_bundle: Path, recorded: Trace, tmp_path: Path) -> None:
    from dataclasses import replace

    save_learned(tmp_path / "p.npz", train(replace(recorded, model="another")))
    with pytest.raises(TraceError, match="was trained for another bundle than this one"):
        decode(demo_bundle, policy=f"learned:{tmp_path / 'p.npz'}")
    with pytest.raises(ConfigError, match="unknown --policy 'magic'"):
        decode(demo_bundle, policy="magic")
    with pytest.raises(TraceError, match="cannot be written"):
        decode(demo_bundle, record_trace=tmp_path / "nowhere" / "t.npz")


def test_from_recording_to_a_run_by_command(
    demo_bundle: Path, recorded: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tmp_path / "p.npz"
    assert main(["cache", "train", str(recorded.path), "-o", str(policy)]) == 0
    assert "forecast, 30 layers of 8 experts, learned from 300 tokens" in capsys.readouterr().out
    words = ["run", "--raw", "--expert-slots", "150", "--max-tokens", "2", "--policy", f"learned:{policy}"]
    assert main([*words, str(demo_bundle), "Once"]) == 0
    assert main(["cache", "train", str(recorded.path), "-o", str(tmp_path / "no" / "p.npz")]) == 1
    assert "cannot be written" in capsys.readouterr().err
