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
from flashmoe.convert.export import export
from flashmoe.engine.engine import Engine, EngineOptions

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
INDEXES: list[dict[str, Any]] = [
    json.loads((GOLDEN / name).read_text(encoding="utf-8"))
    for name in ("golden.json", "attention_families.json")
]
IDS = {
    form: index["models"][entry["model"]]["ids"]
    for index in INDEXES
    for form, entry in index["fixtures"].items()
}
RELATIVE = 1e-4  # of the largest logit; both sides round in float32


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


@pytest.mark.parametrize("form", sorted(IDS))
def test_transformers_agrees_on_tiny_models(form: str, tmp_path: Path) -> None:
    """Every family, in every form that there is a fixture of."""
    ids = IDS[form]
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
