"""The committed demo bundle, dequantised into transformers: our codecs and the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_state import model_of
from reference_logits import run_logits

from flashmoe.bundle.reader import Bundle
from flashmoe.engine.engine import Engine, EngineOptions

DEMO = Path(__file__).parents[2] / "models" / "demo"
PROMPT = "chat"
SAME_MODEL = 2e-4  # transformers against transformers, logits up to 35; 4e-5 measured
TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def ids() -> list[int]:
    golden: dict[str, Any] = json.loads((DEMO / "golden.json").read_text(encoding="utf-8"))
    prompt: list[int] = golden[PROMPT]["ids"]
    return prompt


@pytest.fixture(scope="module")
def logits(ids: list[int]) -> np.ndarray:
    """Logits of transformers on the dequantised bundle, [tokens, vocab]."""
    return run_logits(model_of(Bundle.open(DEMO)), ids)


def test_dequantised_bundle_repeats_the_golden_logits(logits: np.ndarray) -> None:
    golden = json.loads((DEMO / "golden.json").read_text(encoding="utf-8"))
    with np.load(DEMO / "golden.npz") as arrays:
        expected = arrays[f"{PROMPT}_logits"]
    assert np.abs(logits[golden[PROMPT]["logit_positions"]] - expected).max() <= SAME_MODEL


def test_engine_matches_at_every_position(ids: list[int], logits: np.ndarray) -> None:
    with Engine.open(DEMO, EngineOptions(activations="f32")) as engine:
        assert np.abs(engine.logits(ids) - logits).max() <= TOLERANCE
