"""Reading ahead: what is guessed, when it is read, and when it is given up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashmoe.engine.engine import Engine, EngineOptions
from flashmoe.engine.lookahead import AHEAD, Lookahead
from flashmoe.engine.workbench import Workbench
from flashmoe.errors import ConfigError


class Step:
    """A request, and a cache that holds `resident` of every layer."""

    def __init__(self, resident: Sequence[int] = ()) -> None:
        self.resident = set(resident)
        self.read: list[tuple[int, list[int]]] = []

    def resident_experts(self, layer: int) -> set[int]:
        return self.resident

    def foresee(self, layer: int, experts: Sequence[int]) -> None:
        self.read.append((layer, list(experts)))


def lookahead(step: Any, mode: str) -> Lookahead:
    return Lookahead(step, mode)


def test_the_most_probable_missing_experts_are_read() -> None:
    step: Any = Step(resident=[7, 4])
    ahead = lookahead(step, "on")
    ahead.guess(lambda _: (3, [7, 1, 4, 9, 2, 8, 0]), 1)
    ahead.read(step)
    assert step.read == [(3, [1, 9, 2, 8, 0][:AHEAD])]
    ahead.judge(3, [1, 4, 7])
    assert (ahead.guesses, ahead.right) == (AHEAD, 1)


def test_a_later_guess_replaces_an_earlier_one() -> None:
    step: Any = Step()
    ahead = lookahead(step, "on")
    known = np.ones((1, 4), np.float32)
    told: list[Any] = []

    def foresight(added: Any) -> tuple[int, list[int]]:
        told.append(added)
        return (3, [1] if added is None else [2])

    ahead.guess(foresight, 1)
    ahead.guess(foresight, 1, lambda: known)
    ahead.read(step)
    assert told == [None, known]
    assert step.read == [(3, [2])]
    ahead.judge(3, [2])
    assert (ahead.guesses, ahead.right) == (1, 1)


def test_wrong_guesses_end_it_and_right_ones_bring_it_back() -> None:
    step: Any = Step()
    ahead = lookahead(step, "auto")
    for _ in range(10):
        ahead.guess(lambda _: (1, [0, 1]), 1)
        ahead.judge(1, [5, 6])
    assert not ahead.reading
    ahead.guess(lambda _: (1, [0, 1]), 1)
    ahead.read(step)
    assert step.read == []
    for _ in range(16 * 60):  # only now and then is a guess still made
        ahead.guess(lambda _: (1, [0, 1]), 1)
        ahead.judge(1, [0, 1])
    assert ahead.reading


def test_a_guess_for_another_layer_is_not_judged() -> None:
    step: Any = Step()
    ahead = lookahead(step, "on")
    ahead.guess(lambda _: (3, [1]), 1)
    ahead.judge(0, [2])
    assert ahead.guesses == 0


def test_off_asks_nobody() -> None:
    def fail(_: Any) -> tuple[int, list[int]]:
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
