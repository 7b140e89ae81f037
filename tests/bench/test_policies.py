"""flashmoe bench policies: a replayed trace reaches the store as it is, and a run hits what its replay hits."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from flashmoe.bench.policies import RunOptions, TrialOptions, compare, measure
from flashmoe.bench.replay import Material, Setting, replay
from flashmoe.bench.routing import ReplayedRouting, cut, onto, save_trace
from flashmoe.cli import main
from flashmoe.engine.engine import Engine, EngineOptions
from flashmoe.errors import ConfigError
from flashmoe.store.policies.registry import Geometry
from flashmoe.store.trace import Trace, read_trace

LAYERS, EXPERTS = 30, 8  # of the demo model
TEXT = (
    "Once upon a time there was a little dog. He liked to run in the garden and play with a red ball. " * 12
)


@pytest.fixture
def recorded(tmp_path: Path) -> Trace:
    """Ten sequences of 30 tokens of a smaller model: 2 layers, 3 of 6 experts, of which each sequence prefers some."""
    rng = np.random.default_rng(5)
    liked = rng.random((10, 2, 6)) ** 4 + 1e-3
    ids = [
        [rng.choice(6, 3, False, row / row.sum()) for row in liked[sequence]]
        for sequence in range(10)
        for _ in range(30)
    ]
    path = tmp_path / "small.npz"
    np.savez(path, expert_ids=np.array(ids), sequence_id=np.arange(300) // 30, token_id=np.arange(300))
    return read_trace(path)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text(TEXT)
    return path


def test_a_trace_is_laid_onto_a_larger_model(recorded: Trace) -> None:
    mapped = onto(recorded, Geometry((1, 2, 5), 13, "model"))
    assert (mapped.layers, mapped.experts, mapped.model) == ((1, 2, 5), 13, "model")
    spread = np.array([0, 2, 4, 6, 8, 10])
    for layer, source in enumerate([0, 1, 0]):
        assert np.array_equal(mapped.expert_ids[:, layer], spread[recorded.expert_ids[:, source]])
    with pytest.raises(ConfigError, match="routes to 6 experts and the bundle has 5"):
        onto(recorded, Geometry((0, 1), 5))


def test_a_cut_takes_whole_sequences_from_all_over(recorded: Trace) -> None:
    assert cut(recorded, 30).token_ids.tolist() == list(range(30))
    assert cut(recorded, 75).token_ids.tolist() == [*range(30), *range(90, 120), *range(180, 195)]
    assert cut(recorded, 300).tokens == 300
    with pytest.raises(ConfigError, match="300 tokens are fewer than 301"):
        cut(recorded, 301)


def test_a_saved_trace_is_read_again(recorded: Trace, tmp_path: Path) -> None:
    mapped = onto(recorded, Geometry((0, 1), 6, "model"))
    save_trace(mapped, tmp_path / "t.npz")
    again = read_trace(tmp_path / "t.npz")
    for name in ("expert_ids", "token_ids", "sequences", "steps", "phases"):
        assert np.array_equal(getattr(again, name), getattr(mapped, name)), name
    assert (again.layers, again.experts, again.model) == ((0, 1), 6, "model")


def test_the_store_sees_the_ids_of_the_trace(demo_bundle: Path, recorded: Trace, tmp_path: Path) -> None:
    """What the engine's recorder and the cache hear, behind the hook."""
    driving = onto(recorded, Geometry(tuple(range(LAYERS)), EXPERTS)).select(np.arange(25))
    seen: list[tuple[int, list[int]]] = []
    options = EngineOptions(context=64, threads=1, experts_per_token=3, record_trace=tmp_path / "t.npz")
    with Engine.open(demo_bundle, options) as engine:
        asked = engine.cache.request

        def request(layer: int, experts: list[int]) -> object:
            seen.append((layer, list(experts)))
            return asked(layer, experts)

        engine.cache.request = request  # type: ignore[method-assign, assignment]
        routing = ReplayedRouting(engine, driving)
        engine.start()
        for i in range(25):
            routing.token = i
            engine.feed([7])
    assert np.array_equal(read_trace(tmp_path / "t.npz").expert_ids, driving.expert_ids)
    expected = [(layer, experts) for _, step in driving.events() for layer, experts in enumerate(step)]
    assert seen == expected


@pytest.mark.parametrize("policy", ["lru", "lfu-decay"])
def test_a_driven_run_hits_what_the_replay_foretells(
    demo_bundle: Path, recorded: Trace, tmp_path: Path, policy: str
) -> None:
    geometry = Geometry(tuple(range(LAYERS)), EXPERTS)
    driving = onto(recorded, geometry).select(np.arange(90))
    save_trace(driving, tmp_path / "t.npz")
    report = measure(RunOptions(str(demo_bundle), policy, 4, str(tmp_path / "t.npz"), 40, own_routers=False))
    outcome = replay(Material.of(driving), policy, Setting(4, "shared"), geometry)
    expected = outcome.hits[40:].sum() / outcome.asked[40:].sum()
    tolerance = 0.02 if policy == "lru" else 0  # which of an event's reads lands first is up to the drive
    assert report["hit_rate"] == pytest.approx(expected, abs=tolerance)
    assert report["slots"] == 4 * LAYERS


def test_policies_are_compared_on_a_text(demo_bundle: Path, text: Path) -> None:
    wanted = TrialOptions(demo_bundle, ["lfu-decay", "learned"], 5, text=text, teach=260, warm=4, tokens=8)
    runs = compare(replace(wanted, repeats=2), lambda _: None)
    assert [(run["policy"], run["round"]) for run in runs] == [
        ("lfu-decay", 0),
        ("learned", 0),
        ("lfu-decay", 1),
        ("learned", 1),
    ]
    for run in runs:
        assert run["hit_rate"] == pytest.approx(run["replayed_hit_rate"])
        assert run["tok_s"] > 0
    with pytest.raises(ConfigError, match=r"story\.txt: \d+ tokens are fewer than 5000: give a longer text"):
        compare(replace(wanted, teach=4988), lambda _: None)


def test_the_command(recorded: Trace, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    words = ["bench", "policies", "--trace", str(recorded.path), "--slots", "4", "--policy", "lru,lfu-decay"]
    words += ["--warm", "4", "--tokens", "6", "--repeats", "1"]
    assert main([*words, "--json", "--results", str(results)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert json.loads(results.read_text()) == report
    assert [row["policy"] for row in report["results"]] == ["lru", "lfu-decay"]
    assert report["results"][0]["ratio"] == 1
    assert report["options"]["trace"] == "small.npz"
    assert main(words) == 0
    assert "all policies gave the same logits" in capsys.readouterr().out
    assert main([*words, "--tokens", "600"]) == 1
    assert "tokens are fewer than 604" in capsys.readouterr().err
    assert main(["bench", "policies", "--slots", "4"]) == 2
    assert "one of the arguments --trace --text is required" in capsys.readouterr().err


def test_options_reach_the_process_as_json(demo_bundle: Path) -> None:
    options = RunOptions(str(demo_bundle), "lru", 4, "t.npz", 0, own_routers=True)
    assert RunOptions(**json.loads(json.dumps(asdict(options)))) == options
