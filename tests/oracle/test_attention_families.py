"""gpt-oss and DeepSeek-V3 of other seeds and shapes: transformers and the engine, side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attention_families import (
    RELATIVE_TOLERANCE,
    deepseek_config,
    deepseek_weights,
    gpt_oss_config,
    gpt_oss_weights,
    pack_mxfp4,
    save_form,
    save_mxfp4,
    settle,
)

from flashmoe.convert import convert
from flashmoe.engine.engine import Engine, EngineOptions

ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def gpt_oss(**changes: Any) -> Callable[[int], tuple[Any, Any]]:
    return lambda seed: (gpt_oss_config(**changes), gpt_oss_weights(gpt_oss_config(**changes), seed))


def packed(seed: int) -> tuple[Any, Any]:
    config = gpt_oss_config(sliding_window=3, intermediate_size=96)
    return config, pack_mxfp4(config, gpt_oss_weights(config, seed), seed)[1]


def deepseek(**changes: Any) -> Callable[[int], tuple[Any, Any]]:
    return lambda seed: (deepseek_config(**changes), deepseek_weights(deepseek_config(**changes), seed))


CASES = {
    "gpt_oss-wide-head": gpt_oss(head_dim=64, num_attention_heads=2, num_key_value_heads=1, hidden_size=128),
    "gpt_oss-all-experts": gpt_oss(num_local_experts=3, num_experts_per_tok=3, sliding_window=33),
    "gpt_oss-no-yarn": gpt_oss(rope_parameters=ROPE, swiglu_limit=2.0, num_hidden_layers=3),
    "deepseek-no-query-latent": deepseek(q_lora_rank=None, rope_interleave=False),
    "deepseek-one-group": deepseek(n_group=1, topk_group=1, norm_topk_prob=False, kv_lora_rank=96),
    "deepseek-no-yarn": deepseek(rope_parameters=ROPE, first_k_dense_replace=0, v_head_dim=32),
    "deepseek-many-heads": deepseek(num_attention_heads=36, num_key_value_heads=36, qk_rope_head_dim=4),
}


def compare(folder: Path, reference: Any) -> None:
    with Engine.open(folder, EngineOptions(activations="f32")) as engine:
        got = np.array(engine.logits(reference.ids))
    assert np.abs(got - reference.logits).max() <= RELATIVE_TOLERANCE * np.abs(reference.logits).max()


@pytest.mark.parametrize("name", CASES)
def test_engine_matches_transformers(name: str, tmp_path: Path) -> None:
    config, state, reference = settle(CASES[name], 1000)
    save_form(tmp_path / "source", config, state, torch.bfloat16, 10**9)
    convert(tmp_path / "source", tmp_path / "bundle")
    compare(tmp_path / "bundle", reference)


def test_mxfp4_matches_transformers(tmp_path: Path) -> None:
    """96 columns between the products: three groups of 32."""
    config, state, reference = settle(packed, 2000)
    for seed in range(2000, 2200):
        stored, exact = pack_mxfp4(config, gpt_oss_weights(config, seed), seed)
        if torch.equal(exact["lm_head.weight"], state["lm_head.weight"]):
            break
    save_mxfp4(tmp_path / "source", config, stored)
    report = convert(tmp_path / "source", tmp_path / "bundle")
    assert report.unknown == []
    compare(tmp_path / "bundle", reference)
