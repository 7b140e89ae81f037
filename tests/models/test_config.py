"""Reading hyper-parameters: real files, every form, and every bad value by its key."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.errors import ConfigError
from flashmoe.models.qwen3_5_config import FULL, LINEAR, Qwen35Config
from flashmoe.models.registry import find_family
from flashmoe.models.spec import MatrixSpec

# The text part of Qwen3.5-35B-A3B, as its config.json has it.
TEXT: dict[str, Any] = {
    "attention_bias": False,
    "attn_output_gate": True,
    "eos_token_id": 248044,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_5_moe_text",
    "moe_intermediate_size": 512,
    "num_attention_heads": 16,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "shared_expert_intermediate_size": 512,
    "vocab_size": 248320,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25},
}
NEXT: dict[str, Any] = {
    **{k: v for k, v in TEXT.items() if k not in ("rope_parameters", "attn_output_gate")},
    "model_type": "qwen3_next",
    "rope_theta": 10000000,
    "partial_rotary_factor": 0.25,
    "rope_scaling": None,
    "intermediate_size": 5120,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}


def changed(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return copy.deepcopy(base) | changes


def test_the_flat_and_the_nested_file_read_alike() -> None:
    nested = {
        "model_type": "qwen3_5_moe",
        "text_config": TEXT,
        "tie_word_embeddings": False,
        "vision_config": {},
    }
    config = Qwen35Config.from_dict(TEXT)
    assert config == Qwen35Config.from_dict(nested)
    assert config.layer_types[:5] == (LINEAR, LINEAR, LINEAR, FULL, LINEAR)
    assert (config.rotary_dim, config.conv_dim, config.value_dim) == (64, 8192, 4096)
    assert config.eos_token_ids == (248044,)
    assert config.rope_theta == 1e7
    assert not config.dense_layers


def test_tying_is_read_at_both_levels() -> None:
    nested = {"model_type": "qwen3_5_moe", "text_config": TEXT, "tie_word_embeddings": True}
    assert Qwen35Config.from_dict(nested).tie_word_embeddings
    assert Qwen35Config.from_dict(changed(TEXT, tie_word_embeddings=True)).tie_word_embeddings


def test_listed_layer_types_win_over_the_interval() -> None:
    listed = [FULL, LINEAR] * 20
    assert Qwen35Config.from_dict(changed(TEXT, layer_types=listed)).layer_types == tuple(listed)


def test_qwen3_next_has_dense_layers_and_its_own_switches() -> None:
    config = Qwen35Config.from_dict(
        changed(NEXT, decoder_sparse_step=2, mlp_only_layers=[1], num_hidden_layers=6)
    )
    assert config.dense_layers == {0, 1, 2, 4}
    assert config.intermediate_size == 5120
    assert config.rope_theta == 1e7
    assert Qwen35Config.from_dict(NEXT).intermediate_size is None


def test_routing_weights_that_are_not_renormalised_are_refused() -> None:
    with pytest.raises(ConfigError, match="norm_topk_prob"):
        Qwen35Config.from_dict(changed(NEXT, norm_topk_prob=False))


def test_every_layer_of_qwen3_5_moe_has_experts() -> None:
    config = Qwen35Config.from_dict(changed(TEXT, mlp_only_layers=[0], norm_topk_prob=False))
    assert not config.dense_layers


BAD = [
    ("num_experts", 0),
    ("num_experts", "256"),
    ("num_experts", True),
    ("hidden_size", 2048.0),
    ("vocab_size", None),
    ("num_experts_per_tok", 257),
    ("num_key_value_heads", 3),
    ("linear_num_key_heads", 5),
    ("linear_conv_kernel_dim", 1),
    ("head_dim", -1),
    ("rms_norm_eps", 0),
    ("rms_norm_eps", "1e-6"),
    ("rms_norm_eps", float("nan")),
    ("layer_types", [LINEAR]),
    ("layer_types", "full"),
    ("layer_types", ["sliding_attention"] * 40),
    ("full_attention_interval", 0),
    ("eos_token_id", "x"),
    ("eos_token_id", [-1]),
    ("tie_word_embeddings", "no"),
    ("hidden_act", "gelu"),
    ("attention_bias", True),
    ("attn_output_gate", False),
    ("rope_scaling", {"type": "yarn", "factor": 4}),
    ("rope_parameters", []),
    ("max_position_embeddings", 1 << 40),
]


@pytest.mark.parametrize(("key", "value"), BAD, ids=[f"{k}={v!r:.20}" for k, v in BAD])
def test_bad_values_are_named_with_a_remedy(key: str, value: Any) -> None:
    for raw, name in (
        (changed(TEXT, **{key: value}), key),
        ({"model_type": "qwen3_5_moe", "text_config": changed(TEXT, **{key: value})}, f"text_config.{key}"),
    ):
        with pytest.raises(ConfigError, match=rf"^config\.json: {name} .*: use the model's own") as caught:
            Qwen35Config.from_dict(raw)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_theta", None),
        ("rope_type", "yarn"),
        ("partial_rotary_factor", 1.5),
        ("partial_rotary_factor", 0.012),
    ],
)
def test_bad_rope_values_are_named(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key):
        Qwen35Config.from_dict(changed(TEXT, rope_parameters=TEXT["rope_parameters"] | {key: value}))


@pytest.mark.parametrize("key", [k for k in TEXT if k not in ("hidden_act",)])
def test_every_missing_key_is_fine_or_named(key: str) -> None:
    raw = {k: v for k, v in TEXT.items() if k != key}
    optional = {
        "attention_bias",
        "attn_output_gate",
        "eos_token_id",
        "full_attention_interval",
        "mlp_only_layers",
        "model_type",
    }
    if key in optional:
        Qwen35Config.from_dict(raw)
    else:
        wanted = "rope_theta" if key == "rope_parameters" else key
        with pytest.raises(ConfigError, match=rf"{wanted} is missing"):
            Qwen35Config.from_dict(raw)


@given(
    st.sampled_from(sorted(NEXT)),
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.lists(st.integers(), max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_any_value_is_read_or_a_config_error(key: str, value: object) -> None:
    for base in (TEXT, NEXT):
        try:
            Qwen35Config.from_dict(changed(base, **{key: value}))
        except ConfigError as error:
            message = str(error)
        else:
            message = ""
        assert "\n" not in message


def test_families_are_found_at_both_levels() -> None:
    assert find_family(TEXT).model_type == "qwen3_5_moe"
    assert find_family(NEXT).model_type == "qwen3_next"
    assert find_family({"model_type": "x", "text_config": TEXT}).model_type == "qwen3_5_moe"


@pytest.mark.parametrize(
    "raw", [{}, {"model_type": "gpt2"}, {"model_type": ["qwen3_next"]}, {"text_config": 3}]
)
def test_unknown_families_are_refused(raw: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="not supported"):
        find_family(raw)


def test_the_untied_embedding_is_the_last_resident_tensor() -> None:
    family = find_family(TEXT)
    spec = family.spec(family.config(TEXT))
    assert [item.name for item in spec.resident[-2:]] == ["lm_head", "embed_tokens"]
    tied = family.spec(family.config(changed(TEXT, tie_word_embeddings=True)))
    assert [item.name for item in tied.resident if item.name == "lm_head"] == []


def test_qwen3_next_picks_the_same_rows_once() -> None:
    family = find_family(NEXT)
    spec = family.spec(family.config(NEXT))
    grouped = [
        s
        for s in spec.resident
        if isinstance(s, MatrixSpec) and s.source.module == "layers.0.linear_attn.in_proj_qkvz"
    ]
    rows = [row for s in grouped for start, count in s.source.runs for row in range(start, start + count)]
    assert sorted(rows) == list(range(grouped[0].source.rows))
    assert [s.source.picked_rows for s in grouped] == [8192, 4096]
    assert grouped[0].source.runs[:2] == ((0, 128), (768, 128)), (
        "q of key heads 0 and 1: 128+128+256+256 rows apart"
    )
