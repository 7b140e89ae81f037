"""Exported checkpoints, loaded by transformers as it loads any other, give the engine's logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from reference_logits import run_logits

from flashmoe.convert import convert
from flashmoe.convert.export import EXPORTED, export
from flashmoe.engine.engine import Engine, EngineOptions
from flashmoe.models.registry import find_family

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
INDEX: dict[str, Any] = json.loads((GOLDEN / "golden.json").read_text(encoding="utf-8"))
RELATIVE = 1e-4  # of the largest logit; both sides round in float32


def exported(form: str) -> bool:
    config = json.loads((GOLDEN / form / "config.json").read_text(encoding="utf-8"))
    return find_family(config).model_type in EXPORTED


def loaded_logits(folder: Path, ids: list[int]) -> np.ndarray:
    """Logits of transformers; a weight that it does not find or does not know is a failure."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="float32", attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    assert not report["mismatched_keys"], report
    model.config._experts_implementation = "eager"
    return run_logits(model.eval(), ids)


def engine_logits(bundle: Path, ids: list[int]) -> np.ndarray:
    with Engine.open(bundle, EngineOptions(activations="f32")) as engine:
        return np.array(engine.logits(ids))


@pytest.mark.parametrize("form", [form for form in sorted(INDEX["fixtures"]) if exported(form)])
def test_transformers_agrees_on_tiny_models(form: str, tmp_path: Path) -> None:
    ids = INDEX["models"][INDEX["fixtures"][form]["model"]]["ids"]
    bundle = convert(GOLDEN / form, tmp_path / "bundle").path
    export(bundle, tmp_path / "out", dtype="f32", shard_nbytes=100_000)
    wanted, found = engine_logits(bundle, ids), loaded_logits(tmp_path / "out", ids)
    assert np.abs(found - wanted).max() <= RELATIVE * np.abs(wanted).max()


def test_transformers_agrees_on_the_demo_model(tmp_path: Path) -> None:
    demo = ROOT / "models" / "demo"
    ids = json.loads((demo / "golden.json").read_text(encoding="utf-8"))["chat"]["ids"]
    export(demo, tmp_path / "out", dtype="f32")
    wanted, found = engine_logits(demo, ids), loaded_logits(tmp_path / "out", ids)
    assert np.abs(found - wanted).max() <= RELATIVE * np.abs(wanted).max()
