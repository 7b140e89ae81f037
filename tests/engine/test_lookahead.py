"""Reading ahead: what is guessed, when it is read, and when it is given up."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashmoe.engine.engine import Engine, EngineOptions
from flashmoe.engine.lookahead import AHEAD, DEPTH, ENOUGH, Lookahead
from flashmoe.engine.workbench import Workbench
from flashmoe.errors import ConfigError
from flashmoe.nn.blocks import Foresight
from flashmoe.nn.weights import I32


class Step:
    """A request, and a cache that holds `resident` of every layer and reads `coming` already."""

    def __init__(self, resident: Sequence[int] = (), coming: Sequence[tuple[int, int]] = ()) -> None:
        self.resident, self.coming = set(resident), set(coming)
        self.read: list[tuple[int, list[int]]] = []

    def resident_experts(self, layer: int) -> set[int]:
        return self.resident

    def foresee(self, *guesses: tuple[int, Sequence[int]]) -> None:
        self.read += [(layer, list(experts)) for layer, experts in guesses]


def lookahead(step: Any, mode: str) -> Lookahead:
    return Lookahead(step, mode)


def sure(*layers: tuple[int, list[int]]) -> Foresight:
    """Foretells of one token the same whatever is known."""
    return lambda _: ((layer, np.array([experts], np.int32)) for layer, experts in layers)


def test_the_most_probable_missing_experts_are_read() -> None:
    step: Any = Step(resident=[7, 4])
    ahead = lookahead(step, "on")
    ahead.guess(sure((3, [7, 1, 4, 9, 2, 8, 0, 5])), 1)
    ahead.read(step)
    assert step.read == [(3, [1, 9, 2, 8, 0][:AHEAD])]
    ahead.judge(3, [1, 4, 7])
    assert (ahead.guesses, ahead.right) == (AHEAD, 1)


def test_a_later_guess_replaces_an_earlier_one() -> None:
    step: Any = Step()
    ahead = lookahead(step, "on")
    known = np.ones((1, 4), np.float32)
    told: list[Any] = []

    def foresight(added: Any) -> Iterator[tuple[int, I32]]:
        told.append(added)
        yield 3, np.array([[1] if added is None else [2]], np.int32)

    ahead.guess(foresight, 1)
    ahead.guess(foresight, 1, lambda: known)
    ahead.read(step)
    assert told == [None, known]
    assert step.read == [(3, [2])]
    ahead.judge(3, [2])
    assert (ahead.guesses, ahead.right) == (1, 1)


def test_layers_further_on_are_guessed_until_the_drive_has_enough_to_read() -> None:
    def foresight(_: Any) -> Iterator[tuple[int, I32]]:
        for layer in range(3, 20):
            asked.append(layer)
            yield layer, np.array([[0, 1 + layer % 2]], np.int32)

    asked = list[int]()
    # Each layer misses one, and that of layer 3 is being read.
    step: Any = Step(resident=[0], coming=[(3, 2)])
    ahead = lookahead(step, "on")
    ahead.guess(foresight, 1)
    ahead.read(step)
    assert asked == list(range(3, 3 + min(DEPTH, 1 + ENOUGH)))
    assert step.read == [(layer, [1 + layer % 2]) for layer in asked]
    ahead.judge(3, [2])
    assert (ahead.guesses, ahead.right) == (1, 1)
    ahead.judge(4, [7])
    assert ahead.guesses == 1, (
        "only the next layer's are judged: the others are guessed again before they count"
    )


def test_one_layer_is_enough_when_it_misses_enough() -> None:
    step: Any = Step()
    ahead = lookahead(step, "on")
    ahead.guess(sure((3, [9, 8, 7, 6, 5, 4, 3, 2]), (4, [1])), 1)
    ahead.read(step)
    assert [layer for layer, _ in step.read] == [3]


@pytest.mark.parametrize(
    ("k", "guessed"), [(8, [7, 6, 5]), (10, [9, 8, 7]), (4, [4, 3, 3]), (2, [2, 2, 2]), (1, [1, 1, 1])]
)
def test_the_further_ahead_the_fewer_are_sure(k: int, guessed: list[int]) -> None:
    # All but one of each layer's are resident: the guessed ones are found by moving it along the ranks.
    counts = [0] * DEPTH
    for rank in range(k):
        step: Any = Step(resident=[e for e in range(k) if e != rank])
        ahead = lookahead(step, "on")
        ahead.guess(sure(*((layer, list(range(k))) for layer in range(DEPTH))), 1)
        ahead.read(step)
        for layer, experts in step.read:
            counts[layer] += len(experts)
    assert counts == guessed


def test_every_token_s_most_probable_come_first() -> None:
    step: Any = Step(resident=[5])
    ahead = lookahead(step, "on")
    ahead.guess(lambda _: iter([(0, np.array([[1, 2], [3, 1]], np.int32))]), 2)
    ahead.read(step)
    assert step.read == [(0, [1, 3, 2])]


def test_wrong_guesses_end_it_and_right_ones_bring_it_back() -> None:
    step: Any = Step()
    ahead = lookahead(step, "auto")
    for _ in range(10):
        ahead.guess(sure((1, [0, 1])), 1)
        ahead.judge(1, [5, 6])
    assert not ahead.reading
    ahead.guess(sure((1, [0, 1])), 1)
    ahead.read(step)
    assert step.read == []
    for _ in range(16 * 60):  # only now and then is a guess still made
        ahead.guess(sure((1, [0, 1])), 1)
        ahead.judge(1, [0, 1])
    assert ahead.reading


def test_a_guess_for_another_layer_is_not_judged() -> None:
    step: Any = Step()
    ahead = lookahead(step, "on")
    ahead.guess(sure((3, [1])), 1)
    ahead.judge(0, [2])
    assert ahead.guesses == 0


def test_off_asks_nobody() -> None:
    def fail(_: Any) -> Iterator[tuple[int, I32]]:
        raise AssertionError("nobody wants to know")

    step: Any = Step()
    ahead = lookahead(step, "off")
    ahead.guess(fail, 1)
    ahead.read(step)
    assert step.read == []


def test_the_demo_model_is_foreseen(demo_bundle: Path) -> None:
    ids = json.loads((demo_bundle / "golden.json").read_text())["long"]["ids"][:48]
    with Engine.open(demo_bundle, EngineOptions(expert_slots=100, lookahead="on")) as engine:
        for token in ids:
            engine.feed([token])
        ahead = engine._parts.experts.lookahead
        assert ahead.guesses > 48
        # Chosen blindly, at most 4 of 8 would be right; favourites, the easy ones, are in memory and not guessed.
        assert ahead.right / ahead.guesses > 0.7, "no better than chance"
        counts = engine._parts.cache.stats().total
        assert 0 < counts.foreseen <= counts.misses


def test_a_pool_of_one_step_lends_nothing(demo_bundle: Path) -> None:
    with Engine.open(demo_bundle, EngineOptions(expert_slots=6, lookahead="on")) as engine:
        for token in (1, 2, 3):
            engine.feed([token])
        assert engine._parts.cache.stats().total.foreseen == 0


def test_nobody_is_asked_when_all_experts_are_in_memory(demo_bundle: Path) -> None:
    with Engine.open(demo_bundle, EngineOptions(expert_slots=240, lookahead="on")) as engine:
        ahead, asked = engine._parts.experts.lookahead, list[bool]()
        ahead.guess = lambda foresight, tokens, added=None: asked.append(foresight is not None)
        engine.feed([1])
        assert any(asked)
        Workbench(engine).warm()
        asked.clear()
        engine.feed([2])
        engine.feed([3, 4])
        assert not asked


def test_an_unknown_mode_is_refused(demo_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="auto, on, off"):
        Engine.open(demo_bundle, EngineOptions(lookahead="maybe"))
