"""Configurations of the plain attention families: real ones, defaults, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.convert import describe
from flashmoe.errors import ConfigError
from flashmoe.models.gqa import GqaConfig
from flashmoe.models.registry import find_family
from flashmoe.models.spec import MatrixSpec
from flashmoe.nn.attention import AttentionShape
from flashmoe.nn.moe import MoeShape
from flashmoe.nn.rope_scaling import LinearScaling, Llama3Scaling
from flashmoe.nn.rotary import Rope, RotaryTable
from flashmoe.nn.yarn import Yarn

SHARED = Path(__file__).resolve().parents[3] / "shared" / "configs"

BASE: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
}
MOE = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128}
TYPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "qwen3_moe": MOE,
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 16, "num_experts_per_tok": 4},
    "glm4_moe": {
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 128,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
}


def raw(model_type: str, **changes: Any) -> dict[str, Any]:
    return BASE | TYPES[model_type] | {"model_type": model_type} | changes


def read(model_type: str, **changes: Any) -> GqaConfig:
    config = find_family(raw(model_type)).config(raw(model_type, **changes))
    assert isinstance(config, GqaConfig)
    return config


def mixer(model_type: str, layer: int = 0, **changes: Any) -> AttentionShape:
    found = find_family(raw(model_type)).architecture(read(model_type, **changes)).layers[layer].mixer
    assert isinstance(found, AttentionShape)
    return found


def experts(model_type: str, **changes: Any) -> MoeShape:
    found = find_family(raw(model_type)).architecture(read(model_type, **changes)).layers[-1].ffn
    assert isinstance(found, MoeShape)
    return found


@pytest.mark.parametrize("model_type", TYPES)
def test_what_a_file_leaves_out_is_the_familys_default(model_type: str) -> None:
    shape = mixer(model_type)
    assert (shape.heads, shape.kv_heads) == (8, 8)
    assert shape.head_dim == (128 if model_type == "qwen3" else 32)
    assert shape.rope == Rope(16 if model_type == "glm4_moe" else shape.head_dim, 50000.0)
    assert not shape.gated
    assert shape.biased == ("qkv" if model_type == "qwen2" else "")
    assert shape.normed == (model_type in ("qwen3", "qwen3_moe", "olmoe"))
    assert shape.flat_norms == (model_type == "olmoe")
    assert shape.window == 0


def test_a_theta_that_is_not_stated_is_the_familys() -> None:
    assert mixer("mixtral", rope_theta=None).rope.theta == 1e6
    assert mixer("llama", rope_theta=None).rope.theta == 1e4


def test_biases_by_attention_bias() -> None:
    assert mixer("llama", attention_bias=True).biased == "qkvo"
    assert mixer("glm4_moe", attention_bias=True).biased == "qkv"


def test_routers() -> None:
    assert not experts("qwen3_moe").renormalised
    assert experts("qwen3_moe", norm_topk_prob=True).renormalised
    assert not experts("olmoe").renormalised
    assert experts("mixtral").renormalised
    assert experts("mixtral").intermediate == 512
    grouped = experts("glm4_moe", n_group=4, topk_group=2, routed_scaling_factor=2.5).grouped
    assert grouped is not None
    assert (grouped.groups, grouped.topk_groups, grouped.scale, grouped.normalise) == (4, 2, 2.5, True)
    assert experts("glm4_moe", n_shared_experts=2).shared_intermediate == 256
    assert not experts("glm4_moe").shared_gated


def test_layers_without_experts() -> None:
    assert read("qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[1]).dense_layers == {0, 1, 2}
    assert read("glm4_moe", first_k_dense_replace=3).dense_layers == {0, 1, 2}
    assert read("qwen3").dense_layers == {0, 1, 2, 3}
    assert read("qwen3").num_experts == 0


def test_windows() -> None:
    assert [mixer("mixtral", i, sliding_window=64).window for i in range(4)] == [64] * 4
    assert mixer("qwen3_moe", sliding_window=64).window == 0
    assert mixer("qwen3_moe", sliding_window=64, use_sliding_window=True).window == 64
    upper = {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 3}
    assert [mixer("qwen2", i, **upper).window for i in range(4)] == [0, 0, 0, 64]
    listed = upper | {"layer_types": ["sliding_attention", "full_attention"] * 2}
    assert [mixer("qwen3", i, **listed).window for i in range(4)] == [64, 0, 64, 0]
    with pytest.raises(ConfigError, match="layer_types"):
        mixer("qwen3", **upper | {"layer_types": ["linear_attention"] * 4})


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_scaled_positions_in_both_spellings(key: str) -> None:
    def scaling(value: dict[str, Any]) -> Any:
        beside = {"rope_theta": 50000.0} if key == "rope_parameters" else {}
        return mixer("llama", **{key: value | beside}).rope.scaling

    assert scaling(LLAMA3) == Llama3Scaling(8.0, 1.0, 4.0, 8192)
    assert scaling({"type": "linear", "factor": 2.0}) == LinearScaling(2.0)
    yarn = scaling({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096})
    assert isinstance(yarn, Yarn)
    assert scaling({"rope_type": "default"}) is None


def test_llama3_keeps_fast_pairs_and_slows_slow_ones() -> None:
    plain = 50000.0 ** -(np.arange(0, 128, 2, dtype=np.float64) / 128)
    scaled = Llama3Scaling(8.0, 1.0, 4.0, 8192).frequencies(plain.astype(np.float32))
    turns = 8192 * plain / (2 * np.pi)
    np.testing.assert_allclose(scaled[turns > 4], plain[turns > 4], rtol=1e-6)
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert (scaled[between] < plain[between]).all()
    assert (scaled[between] > plain[between] / 8).all()


def test_linear_scaling_is_an_earlier_position() -> None:
    scaled, plain = RotaryTable(9, Rope(8, 1e4, LinearScaling(4.0))), RotaryTable(3, Rope(8, 1e4))
    np.testing.assert_allclose(scaled.cos[::4], plain.cos, rtol=1e-6)
    np.testing.assert_allclose(scaled.sin[::4], plain.sin, rtol=1e-6)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "llama",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        "rope_scaling.rope_type is 'dynamic'",
    ),
    ("qwen3", {"rope_scaling": {"type": "longrope"}}, "rope_scaling.type is 'longrope'"),
    ("llama", {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor"),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
    ("llama", {"mlp_bias": True}, "mlp_bias is True, only false is computed"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    ("llama", {"num_attention_heads": 7}, "num_attention_heads"),
    ("qwen2", {"num_key_value_heads": 3}, "num_key_value_heads"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0, only null is computed"),
    ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok"),
    ("qwen3_moe", {"num_experts": None}, "num_experts is missing"),
    ("glm4_moe", {"n_group": 3}, "n_group"),
    ("glm4_moe", {"n_group": 8, "topk_group": 1}, "num_experts_per_tok"),
    ("glm4_moe", {"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
]


@pytest.mark.parametrize(("model_type", "changes", "said"), REFUSED, ids=[f"{t}-{s}" for t, _, s in REFUSED])
def test_what_is_not_computed_is_refused_by_name(model_type: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(model_type, **changes)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


KEYS = sorted({key for model_type in TYPES for key in raw(model_type)} - {"model_type"})
VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.integers())
)


@given(st.sampled_from(sorted(TYPES)), st.sampled_from([*KEYS, "rope_scaling", "rope_parameters"]), VALUES)
@settings(max_examples=300, deadline=None)
def test_any_value_is_read_or_a_config_error(model_type: str, key: str, value: object) -> None:
    try:
        read(model_type, **{key: value})
    except ConfigError as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message


def test_mixtral_takes_its_router_from_its_own_name() -> None:
    spec = find_family(raw("mixtral")).spec(read("mixtral"))
    gates = [s.source.module for s in spec.resident if isinstance(s, MatrixSpec) and s.name.endswith(".gate")]
    assert gates == [f"layers.{i}.block_sparse_moe.gate" for i in range(4)]


@pytest.mark.parametrize(
    ("name", "billions", "per_token"),
    [
        ("Qwen--Qwen3-30B-A3B", 29.0, 8),
        ("Qwen--Qwen3-235B-A22B-FP8", 227.1, 8),
        ("mistralai--Mixtral-8x7B-v0.1", 45.1, 2),
    ],
)
def test_real_configurations_have_the_published_sizes(name: str, billions: float, per_token: int) -> None:
    path = SHARED / f"{name}_config.json"
    if not path.exists():
        pytest.skip(f"{path} is not there: published configurations lie beside the repository")
    facts = describe(path)
    config = json.loads(path.read_text())
    size = 3 * config["hidden_size"] * (config.get("moe_intermediate_size") or config["intermediate_size"])
    assert facts["experts"] * facts["expert_layers"] * size / 1e9 == pytest.approx(billions, rel=2e-3)
    assert facts["experts_per_token"] == per_token
    assert facts["attention_layers"] == facts["layers"]
