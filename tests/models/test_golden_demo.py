"""The engine on the committed demo model against its golden files (float32 HF, dequantised weights).

golden.json has per prompt: ids, top20_ids and top20_logits of the last position, logit_positions, greedy_ids
and greedy_logprobs.  golden.npz has <prompt>_logits [positions, vocab] at logit_positions and
chat_routed_experts [layer, token, k], sorted by weight.  Nothing here depends on the model's words, so a
retrained one may replace it file for file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashmoe.engine.engine import Engine, EngineOptions

DEMO = Path(__file__).parents[2] / "models" / "demo"
PROMPTS = ("short", "chat", "chat_tools", "code", "unicode", "long")
TOLERANCE = 2e-3  # max abs of logits up to 35; Hugging Face itself repeats them to 4e-5
# Logits this near may swap places: ten times the tolerance, since both may move and the cache adds a little.
NEAR_TIE = 2e-2
REAL_TEXT_POSITIONS, PIECE = 1500, 128  # with half of them a single near tie decides
MIN_AGREEMENT, MAX_MEAN_KL = 0.97, 5e-3

Floats = NDArray[np.float32]


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    """golden.json."""
    content: dict[str, Any] = json.loads((DEMO / "golden.json").read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """One engine on the float activation path for the whole module."""
    with Engine.open(DEMO, EngineOptions(activations="f32")) as opened:
        yield opened


@dataclass(frozen=True)
class Run:
    """What the float path gave for one prompt."""

    prompt: dict[str, Any]  # its golden.json entry
    expected: Floats  # [positions, vocab] at logit_positions
    logits: Floats  # the same rows, ours
    steps: Floats  # [greedy tokens, vocab]: teacher-forced logits that predict each of greedy_ids


@pytest.fixture(scope="module", params=PROMPTS)
def run(request: pytest.FixtureRequest, golden: dict[str, Any], engine: Engine) -> Run:
    """One prompt: prefill up to each golden position, then the golden continuation token by token."""
    prompt = golden[request.param]
    with np.load(DEMO / "golden.npz") as arrays:
        expected = arrays[f"{request.param}_logits"]
    engine.start()
    rows, fed = [], 0
    for position in prompt["logit_positions"]:
        rows.append(np.array(engine.feed(prompt["ids"][fed : position + 1], "last")[-1]))
        fed = position + 1
    assert fed == len(prompt["ids"])
    steps = [rows[-1]] + [np.array(engine.feed([token], "last")[-1]) for token in prompt["greedy_ids"][:-1]]
    return Run(prompt, expected, np.stack(rows), np.stack(steps))


def log_softmax(logits: Floats) -> NDArray[np.float64]:
    """Row-wise, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def test_logits_match(run: Run) -> None:
    error = np.abs(run.logits - run.expected).max()
    print(f"largest error {error:.1e} of logits up to {np.abs(run.expected).max():.1f}")
    assert error <= TOLERANCE


def test_best_twenty_match(run: Run) -> None:
    last, ids = run.logits[-1], run.prompt["top20_ids"]
    assert np.abs(last[ids] - run.prompt["top20_logits"]).max() <= TOLERANCE
    ours = np.argsort(-last, kind="stable")[:20]
    # Place by place: the same id, or one of nearly the same logit.
    assert np.abs(last[ours] - last[ids]).max() <= NEAR_TIE


def test_greedy_continuation_matches_until_a_near_tie(run: Run) -> None:
    # Teacher-forced on the golden ids, which up to the first difference is what greedy decoding does.
    for step, (row, token) in enumerate(zip(run.steps, run.prompt["greedy_ids"], strict=True)):
        if int(row.argmax()) != token:
            assert row.max() - row[token] < NEAR_TIE, f"step {step}"
            break


def test_greedy_logprobs_match(run: Run) -> None:
    ids = np.array(run.prompt["greedy_ids"])
    ours = log_softmax(run.steps)[np.arange(len(ids)), ids]
    # A log-probability moves by at most twice what logits move.
    assert np.abs(ours - np.array(run.prompt["greedy_logprobs"])).max() <= 2 * TOLERANCE


def test_routed_experts_match(
    golden: dict[str, Any], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Floats, NDArray[np.int32]]] = []
    ops = engine._parts.ops  # the router's decisions are visible nowhere else
    plain = ops.route

    def recorded(logits: Floats, k: int, experts: Any, weights: Any, renormalise: bool = True) -> None:
        plain(logits, k, experts, weights, renormalise)
        seen.append((logits.copy(), experts.copy()))

    monkeypatch.setattr(ops, "route", recorded)
    engine.logits(golden["chat"]["ids"])
    with np.load(DEMO / "golden.npz") as arrays:
        expected = arrays["chat_routed_experts"].astype(np.int32)  # [layers, tokens, k]
    assert len(seen) == expected.shape[0]
    for (logits, ours), theirs in zip(seen, expected, strict=True):
        differences = np.take_along_axis(logits, ours, -1) - np.take_along_axis(logits, theirs, -1)
        assert np.abs(differences).max() <= NEAR_TIE


QUICKER = {
    "int8": EngineOptions(activations="int8"),
    "f16": EngineOptions(activations="f32", kv_cache="f16"),  # caches alone, beside float activations
    "int8 cache": EngineOptions(activations="f32", kv_cache="int8"),
}


@pytest.fixture(scope="module")
def divergence(golden: dict[str, Any], engine: Engine) -> dict[str, tuple[float, float]]:
    """(share of equal most likely tokens, mean KL in nats) of the quicker paths on the same real text."""
    ids = golden["long"]["ids"][:REAL_TEXT_POSITIONS]
    assert len(ids) == REAL_TEXT_POSITIONS
    agreed, total = dict.fromkeys(QUICKER, 0), dict.fromkeys(QUICKER, 0.0)
    with ExitStack() as stack:
        others = {name: stack.enter_context(Engine.open(DEMO, options)) for name, options in QUICKER.items()}
        engine.start()
        for begin in range(0, len(ids), PIECE):
            piece = ids[begin : begin + PIECE]
            exact = log_softmax(engine.feed(piece))
            likely, probability = exact.argmax(-1), np.exp(exact)
            for name, other in others.items():
                quick = log_softmax(other.feed(piece))
                agreed[name] += int((likely == quick.argmax(-1)).sum())
                total[name] += float((probability * (exact - quick)).sum())
    result = {name: (agreed[name] / len(ids), total[name] / len(ids)) for name in QUICKER}
    for name, (share, mean) in result.items():
        print(f"{len(ids)} positions, {QUICKER[name]}: same argmax {share:.2%}, mean KL {mean:.2e}")
    return result


def test_int8_activations_stay_close_to_float(divergence: dict[str, tuple[float, float]]) -> None:
    share, mean = divergence["int8"]
    assert share >= MIN_AGREEMENT
    assert mean <= MAX_MEAN_KL


@pytest.mark.parametrize(
    ("kv_cache", "least_share", "largest_mean"), [("f16", 0.99, 1e-3), ("int8 cache", 0.95, 7e-3)]
)
def test_what_a_smaller_cache_costs(
    divergence: dict[str, tuple[float, float]], kv_cache: str, least_share: float, largest_mean: float
) -> None:
    """See docs/decisions/006."""
    share, mean = divergence[kv_cache]
    assert share >= least_share
    assert 0 < mean <= largest_mean


@pytest.mark.parametrize(("activations", "kv_cache"), [("int8", None), ("f32", None), ("int8", "int8")])
def test_pieces_give_the_same_bits(golden: dict[str, Any], activations: str, kv_cache: str | None) -> None:
    ids = golden["long"]["ids"][:200]
    with Engine.open(DEMO, EngineOptions(activations=activations, kv_cache=kv_cache)) as opened:
        whole = np.array(opened.logits(ids)).view(np.uint32)
        for sizes in ([1] * 200, [1, 63, 2, 65, 69], [7] * 28 + [4]):
            opened.start()
            fed = 0
            for size in sizes:
                part = np.array(opened.feed(ids[fed : fed + size])).view(np.uint32)
                assert np.array_equal(part, whole[fed : fed + size]), f"tokens {fed} to {fed + size}"
                fed += size
            assert fed == len(ids)
