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
# Qwen3-MoE's gates and Qwen3-Next's dense layer are beyond what mlx-lm does at this size.
FORMS = [
    "family_mixtral", "family_olmoe", "family_glm4_moe", "family_llama", "family_qwen2",
    "family_qwen3", "gpt_oss_mxfp4", "deepseek_f32",
]  # fmt: skip


def older_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """Positions beside each other at the top, as published checkpoints have them and mlx-lm reads them."""
    rope = dict(config.pop("rope_parameters", None) or {})
    if not rope:
        return config
    config["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    plain = rope.get("rope_type") == "default"
    return config | {"rope_scaling": None if plain else rope | {"type": rope["rope_type"]}}


def made_by_mlx(form: str, folder: Path, bits: int) -> Any:
    """The model as mlx-lm loads, quantises and saves it in bf16; what is returned computes with that in float32."""
    source = folder.with_name("source")
    shutil.copytree(GOLDEN / form, source)
    for file in source.glob("*mtp*"):  # no model of mlx-lm's reads it
        file.unlink()
    config = older_spelling(json.loads((source / "config.json").read_text()))
    (source / "config.json").write_text(json.dumps(config))
    model, config = mlx_lm.load_model(source)
    model.set_dtype(mx.bfloat16)
    model, config = mlx_lm.quantize_model(model, config, group_size=32, bits=bits)
    mlx_lm.save_model(folder, model)
    mlx_lm.save_config(config, config_path=folder / "config.json")
    model.set_dtype(mx.float32)
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
    print(f"largest error {np.abs(found - wanted).max() / np.abs(wanted).max():.1e} of the largest logit")
    assert np.abs(found - wanted).max() <= RELATIVE * np.abs(wanted).max()
