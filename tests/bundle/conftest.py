"""A small synthetic bundle to open, damage and verify."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashmoe.convert import synth

CONFIG = {
    "model_type": "qwen3_5_moe_text",
    "vocab_size": 272,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "eos_token_id": 256,
}


@pytest.fixture
def small_bundle(tmp_path: Path) -> Path:
    """A bundle of two layers with four experts each, untied."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG), encoding="utf-8")
    return synth(config, tmp_path / "bundle").path
