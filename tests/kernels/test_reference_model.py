"""Whole models on the reference backend: blocks, store and engine need nothing of a backend but the contract."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flashmoe.convert import convert
from flashmoe.engine import loading
from flashmoe.engine.engine import Engine, EngineOptions
from flashmoe.kernels.reference import ReferenceOps

GOLDEN = Path(__file__).parents[1] / "golden"
IDS = [39, 23, 60, 29, 54, 14, 0, 43, 65, 10, 28, 36, 58]
PROMPT = 11


def logits(bundle: Path, activations: str) -> np.ndarray:
    """Of a prompt in one call and the tokens after it, [tokens, vocab]."""
    with Engine.open(bundle, EngineOptions(context=len(IDS), activations=activations, threads=2)) as engine:
        rows = [np.array(engine.logits(IDS[:PROMPT]))]
        rows += [np.array(engine.feed([token])) for token in IDS[PROMPT:]]
    return np.concatenate(rows)


@pytest.mark.parametrize("form", ["mlx_mixed", "hf_next_bf16"])
@pytest.mark.parametrize(("activations", "tolerance"), [("f32", 1e-4), ("int8", 5e-2)])
def test_both_backends_give_the_same_logits(
    form: str, activations: str, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the int8 path a few values round to the other side, and the next layers see it."""
    convert(GOLDEN / form, tmp_path / form)
    native = logits(tmp_path / form, activations)
    monkeypatch.setattr(loading, "CpuOps", lambda threads, activations: ReferenceOps(activations))
    reference = logits(tmp_path / form, activations)
    assert np.abs(native - reference).max() < tolerance
