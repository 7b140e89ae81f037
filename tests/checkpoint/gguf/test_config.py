"""config.json from GGUF metadata, and the order of rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashmoe.checkpoint import Checkpoint
from flashmoe.checkpoint.gguf.names import Names, Orders
from flashmoe.errors import CheckpointError

NUMBERS: dict[str, Any] = {
    "block_count": 2, "context_length": 64, "embedding_length": 64, "feed_forward_length": 96,
    "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 5e5, "rope.dimension_count": 16,
}  # fmt: skip


def written(path: Path, forms: Any, architecture: str, numbers: Any = None, extra: Any = None) -> Path:
    rng = np.random.default_rng(0)
    tensors = {
        name: (rng.normal(0, 0.05, shape), "F32")
        for name, shape in {
            "token_embd.weight": (12, 64), "output_norm.weight": (64,), "blk.0.attn_q.weight": (64, 64),
            "blk.0.attn_k.weight": (32, 64),
        }.items()
    }  # fmt: skip
    result: Path = forms.write(path, architecture, NUMBERS | (numbers or {}), tensors | (extra or {}))
    return result


def test_llama(tmp_path: Path, gguf_forms: Any) -> None:
    config = Checkpoint.open(written(tmp_path / "m.gguf", gguf_forms, "llama")).config
    assert config == {
        "model_type": "llama", "vocab_size": 12, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 5e5, "max_position_embeddings": 64, "tie_word_embeddings": True, "attention_bias": False,
        "eos_token_id": 11, "gguf_architecture": "llama",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "numbers", "expected"),
    [
        (
            "llama",
            {"expert_count": 8, "expert_used_count": 2},
            {"model_type": "mixtral", "num_local_experts": 8},
        ),
        ("qwen2", {}, {"model_type": "qwen2"}),
        ("qwen3", {"attention.key_length": 32}, {"model_type": "qwen3", "head_dim": 32}),
        (
            "qwen3moe",
            {"expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 32},
            {
                "model_type": "qwen3_moe",
                "num_experts": 8,
                "moe_intermediate_size": 32,
                "norm_topk_prob": True,
            },
        ),
        ("olmoe", {"expert_count": 64}, {"model_type": "olmoe", "num_experts": 64, "norm_topk_prob": False}),
        (
            "glm4moe",
            {"leading_dense_block_count": 1, "expert_shared_count": 1, "nextn_predict_layers": 1},
            {"model_type": "glm4_moe", "first_k_dense_replace": 1, "num_hidden_layers": 1},
        ),
    ],
)
def test_other_architectures(
    tmp_path: Path, gguf_forms: Any, architecture: str, numbers: Any, expected: Any
) -> None:
    config = Checkpoint.open(written(tmp_path / "m.gguf", gguf_forms, architecture, numbers)).config
    assert {key: config.get(key) for key in expected} == expected


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_numbers_behind_llama_31_rotations(tmp_path: Path, gguf_forms: Any, factor: float) -> None:
    """By llama.cpp's own rule, wavelength by wavelength."""
    divisors = []
    for i in range(8):
        wavelength = 2 * math.pi * 5e5 ** (2 * i / 16)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    extra = {"rope_freqs.weight": (np.array(divisors), "F32")}
    checkpoint = Checkpoint.open(written(tmp_path / "m.gguf", gguf_forms, "llama", extra=extra))
    assert checkpoint.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert [part.prefix for part in checkpoint.skipped] == ["rope_"]
    extra = {"rope_freqs.weight": (np.array(divisors[::-1]), "F32")}
    with pytest.raises(CheckpointError, match="no table of Llama"):
        Checkpoint.open(written(tmp_path / "n.gguf", gguf_forms, "llama", extra=extra))


def test_llama_rows_are_turned_back(tmp_path: Path, gguf_forms: Any) -> None:
    rng = np.random.default_rng(1)
    query, key = rng.normal(size=(64, 64)).astype(np.float32), rng.normal(size=(32, 64)).astype(np.float32)
    extra = {
        "blk.0.attn_q.weight": (gguf_forms.turned(query, 4), "F32"),
        "blk.0.attn_k.weight": (gguf_forms.turned(key, 2), "F32"),
        "blk.0.attn_q.bias": (gguf_forms.turned(query[:, 0], 4), "F32"),
    }
    checkpoint = Checkpoint.open(written(tmp_path / "m.gguf", gguf_forms, "llama", extra=extra))
    for name, values in (("q", query), ("k", key)):
        matrix = checkpoint.matrix(f"layers.0.self_attn.{name}_proj", *values.shape)
        assert np.array_equal(matrix.read_values([(0, len(values))]), values)
        assert np.array_equal(matrix.read_values([(9, 2), (3, 5)]), values[[9, 10, 3, 4, 5, 6, 7]])
    assert np.array_equal(checkpoint.vector("layers.0.self_attn.q_proj.bias", 64), query[:, 0])
    plain = Checkpoint.open(written(tmp_path / "n.gguf", gguf_forms, "qwen3", extra=extra))
    stored = plain.matrix("layers.0.self_attn.q_proj", 64, 64).read_values([(0, 64)])
    assert np.array_equal(stored, gguf_forms.turned(query, 4))


def test_qwen3_next_has_gates_of_a_key_head_side_by_side() -> None:
    config = {
        "model_type": "qwen3_5_moe_text", "gguf_architecture": "qwen3next", "linear_num_key_heads": 2,
        "linear_num_value_heads": 6, "linear_key_head_dim": 4,
    }  # fmt: skip
    orders, prefix = Orders(config), "layers.0.linear_attn"
    assert orders.source(f"{prefix}.in_proj_a") == (f"{prefix}.in_proj_ba", 2)
    b, a = (orders.rows(f"{prefix}.in_proj_{part}", 6) for part in "ba")
    assert b is not None
    assert a is not None
    assert (b.tolist(), a.tolist()) == ([0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11])
    assert orders.rows(f"{prefix}.in_proj_qkv", 40) is None
    assert orders.columns(f"{prefix}.out_proj", 24) is None


@pytest.mark.parametrize(
    ("model_type", "original", "canonical"),
    [
        ("llama", "token_embd.weight", "embed_tokens.weight"),
        ("llama", "blk.1.ffn_norm.weight", "layers.1.post_attention_layernorm.weight"),
        ("llama", "blk.1.attn_q.bias", "layers.1.self_attn.q_proj.bias"),
        ("mixtral", "blk.0.ffn_gate_exps.weight", "layers.0.block_sparse_moe.switch_mlp.gate_proj.weight"),
        ("mixtral", "blk.0.ffn_down.3.weight", "layers.0.block_sparse_moe.experts.3.w2.weight"),
        ("mixtral", "blk.0.ffn_gate_inp.weight", "layers.0.block_sparse_moe.gate.weight"),
        ("glm4_moe", "blk.0.exp_probs_b.bias", "layers.0.mlp.gate.e_score_correction_bias"),
        ("glm4_moe", "blk.0.ffn_up_shexp.weight", "layers.0.mlp.shared_experts.up_proj.weight"),
        ("qwen3_5_moe_text", "blk.0.ssm_dt.bias", "layers.0.linear_attn.dt_bias"),
        ("qwen3_5_moe_text", "blk.0.ssm_a", "layers.0.linear_attn.A_log"),
        ("qwen3_5_moe_text", "blk.0.something.weight", "layers.0.something.weight"),
        ("qwen3_5_moe_text", "other", "other"),
        ("qwen3_5_moe_text", "blk.0.attn_qkv.weight", "layers.0.linear_attn.in_proj_qkv.weight"),
        ("qwen3", "blk.0.attn_qkv.weight", "layers.0.self_attn.qkv_proj.weight"),
        (
            "qwen3",
            "blk.\u00b2.attn_q.weight",
            "layers.\u00b2.self_attn.q_proj.weight",
        ),  # a digit, and no number
    ],
)
def test_names(model_type: str, original: str, canonical: str) -> None:
    assert Names(model_type, 2).canonical(original) == (canonical, None)
    assert Names(model_type, 2).canonical("blk.2.nextn.eh_proj.weight")[1] == "blk.2."


def test_names_of_joined_experts() -> None:
    names = Names("qwen3_5_moe_text", 8, 4, frozenset("3"))
    assert names.canonical("blk.3.ffn_down_exps.weight")[0] == "layers.3.mlp.experts.down_proj.weight"
    assert names.canonical("blk.2.ffn_down_exps.weight")[0] == "layers.2.mlp.switch_mlp.down_proj.weight"
    assert names.canonical("blk.3.attn_qkv.weight")[0] == "layers.3.self_attn.qkv_proj.weight"


@pytest.mark.parametrize("architecture", ["gemma3", "bert", "phimoe"])
def test_other_architectures_are_refused_by_name(tmp_path: Path, gguf_forms: Any, architecture: str) -> None:
    with pytest.raises(CheckpointError, match=architecture):
        Checkpoint.open(written(tmp_path / "m.gguf", gguf_forms, architecture))


@pytest.mark.parametrize("count", [0, 1 << 30])
def test_impossible_layers_are_refused(tmp_path: Path, gguf_forms: Any, count: int) -> None:
    with pytest.raises(CheckpointError, match="block_count"):
        Checkpoint.open(written(tmp_path / "m.gguf", gguf_forms, "llama", {"block_count": count}))
