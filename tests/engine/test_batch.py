"""Several sequences in one step: each gets the bits that it gets alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flashmoe.engine.engine import Engine, EngineOptions
from flashmoe.errors import ConfigError, PromptError

PROMPTS = [[5, 17, 300, 41, 9], [7], [100, 101, 102, 103, 104, 105, 106, 107], [900, 5, 5, 5]]
DECODED = [[11, 12, 13, 14], [21, 22, 23, 24], [31, 32, 33, 34], [41, 42, 43, 44]]


def alone(engine: Engine, prompt: list[int], decoded: list[int]) -> list[np.ndarray]:
    """Logits after the prompt and after each further token."""
    engine.start()
    rows = [engine.feed(prompt, "last")[0].copy()]
    return rows + [engine.feed([token], "last")[0].copy() for token in decoded]


@pytest.mark.parametrize("slots", [None, 60, 24])
@pytest.mark.parametrize("activations", ["int8", "f32"])
def test_neighbours_change_no_bit(demo_bundle: Path, slots: int | None, activations: str) -> None:
    options = EngineOptions(
        2 << 30, context=256, sequences=4, expert_slots=slots, activations=activations, threads=2
    )
    with Engine.open(demo_bundle, options) as engine:
        expected = [alone(engine, prompt, tokens) for prompt, tokens in zip(PROMPTS, DECODED, strict=True)]
        for state in engine.states:
            state.clear()
        order = [2, 0, 3, 1]
        first = engine.step([(engine.states[i], PROMPTS[i]) for i in order], [0, 1, 2, 3]).copy()
        for row, i in zip(first, order, strict=True):
            np.testing.assert_array_equal(row, expected[i][0])
        for step in range(4):
            logits = engine.step([(engine.states[i], [DECODED[i][step]]) for i in range(4)], [0, 1, 2, 3])
            for i in range(4):
                np.testing.assert_array_equal(logits[i], expected[i][step + 1])


def test_sequences_join_and_leave_between_steps(demo_bundle: Path) -> None:
    with Engine.open(demo_bundle, EngineOptions(2 << 30, context=256, sequences=3)) as engine:
        expected = [alone(engine, PROMPTS[i], DECODED[i]) for i in range(3)]
        states = engine.states
        for state in states:
            state.clear()
        engine.step([(states[0], PROMPTS[0])], [])
        # The second one's prompt comes in two pieces beside the first one's token.
        logits = engine.step([(states[0], DECODED[0][:1]), (states[2], PROMPTS[2][:3])], [0])
        np.testing.assert_array_equal(logits[0], expected[0][1])
        logits = engine.step([(states[2], PROMPTS[2][3:]), (states[0], DECODED[0][1:2])], [1, 0])
        np.testing.assert_array_equal(logits[0], expected[0][2])
        np.testing.assert_array_equal(logits[1], expected[2][0])
        states[0].clear()
        logits = engine.step([(states[0], PROMPTS[1]), (states[2], DECODED[2][:1])], [0, 1])
        np.testing.assert_array_equal(logits[0], expected[1][0])
        np.testing.assert_array_equal(logits[1], expected[2][1])


def test_a_snapshot_brings_a_sequence_back(demo_bundle: Path) -> None:
    with Engine.open(demo_bundle, EngineOptions(2 << 30, context=256, sequences=2)) as engine:
        expected = alone(engine, PROMPTS[2], DECODED[2])
        source, target = engine.states
        source.clear()
        engine.step([(source, PROMPTS[2])], [])
        saved, position = [array.copy() for array in source.arrays()], source.position
        engine.step([(target, PROMPTS[0])], [])  # whatever was there before
        target.restore(position, [[array] for array in saved])
        for token, row in zip(DECODED[2], expected[1:], strict=True):
            np.testing.assert_array_equal(engine.step([(target, [token])], [0])[0], row)


def test_limits(demo_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="--parallel must be between 1 and 16"):
        Engine.open(demo_bundle, EngineOptions(2 << 30, sequences=17))
    with Engine.open(demo_bundle, EngineOptions(2 << 30, context=40, prefill_chunk=16)) as engine:
        with pytest.raises(PromptError, match="17 tokens in one step"):
            engine.step([(engine.states[0], [1] * 17)], [])
        engine.states[0].clear()
        engine.step([(engine.states[0], [1] * 16)], [])
        engine.step([(engine.states[0], [1] * 16)], [])
        with pytest.raises(PromptError, match="48 tokens do not fit the context of 40"):
            engine.step([(engine.states[0], [1] * 16)], [])


def test_more_sequences_are_planned_for(demo_bundle: Path) -> None:
    plans = []
    for sequences in (1, 8):
        with Engine.open(demo_bundle, EngineOptions(2 << 30, context=512, sequences=sequences)) as engine:
            plans.append(engine.plan)
    assert plans[1].state_nbytes > 4 * plans[0].state_nbytes
    assert plans[1].workspace_nbytes > plans[0].workspace_nbytes
    assert "8 sequences of up to 512" in plans[1].describe()
