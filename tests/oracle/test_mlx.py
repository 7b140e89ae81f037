"""Checkpoints that mlx-lm itself makes of tiny models: what MLX computes with them, the engine computes.

MLX has a processor back end for Linux (`pip install mlx mlx-cpu mlx-lm`).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashmoe.convert import convert
from flashmoe.engine.engine import Engine, EngineOptions

mx = pytest.importorskip(
    "mlx.core", reason="MLX is not installed: its checkpoints are compared with our own writer only"
)
mlx_lm = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")

GOLDEN = Path(__file__).parents[1] / "golden"
RELATIVE = 1e-4  # of the largest logit
FORMS = [
    "family_qwen3_moe", "family_mixtral", "family_olmoe", "family_glm4_moe", "family_llama", "family_qwen2",
    "family_qwen3", "family_qwen3_5", "hf_next_bf16", "gpt_oss_bf16", "gpt_oss_mxfp4", "deepseek_f32",
]  # fmt: skip


def made_by_mlx(form: str, folder: Path, bits: int) -> Any:
    """The model as mlx-lm loads and quantises it, saved to a folder; without its choice of dtypes: float32."""
    source = folder.with_name("source")
    shutil.copytree(GOLDEN / form, source)
    for file in source.glob("*mtp*"):  # no model of mlx-lm's reads it
        file.unlink()
    model, config = mlx_lm.load_model(source)
    model.set_dtype(mx.float32)
    model, config = mlx_lm.quantize_model(model, config, group_size=32, bits=bits)
    mlx_lm.save_model(folder, model)
    mlx_lm.save_config(config, config_path=folder / "config.json")
    return model


@pytest.mark.parametrize("form", FORMS)
def test_the_engine_computes_what_mlx_does(form: str, tmp_path: Path) -> None:
    model = made_by_mlx(form, tmp_path / "mlx", bits=4)
    vocab = json.loads((tmp_path / "mlx" / "config.json").read_text())["vocab_size"]
    ids = [int(i) for i in np.random.default_rng(1).integers(0, min(vocab, 70), 24)]
    with mx.stream(mx.cpu):
        wanted = np.array(model(mx.array([ids])).astype(mx.float32))[0]
    report = convert(tmp_path / "mlx", tmp_path / "bundle")
    assert report.unknown == []
    with Engine.open(report.path, EngineOptions(activations="f32")) as engine:
        found = np.array(engine.logits(ids))
    assert np.abs(found - wanted).max() <= RELATIVE * np.abs(wanted).max()
