"""Hyper-parameters of qwen3_5_moe, qwen3_5 and qwen3_next, read from config.json and checked once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashmoe.models.config import MAX_HEAD, Fields, ModelConfig, common_values
from flashmoe.nn.rotary import Rope

LINEAR, FULL = "linear_attention", "full_attention"


@dataclass(frozen=True, kw_only=True)
class Qwen35Config(ModelConfig):
    """The text model.  Sizes are elements; ``layer_types`` has one of LINEAR, FULL per layer."""

    layer_types: tuple[str, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    shared_expert_intermediate_size: int
    intermediate_size: int | None
    rope_theta: float
    partial_rotary_factor: float

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution: q, k and v of all linear-attention heads."""
        return 2 * self.linear_num_key_heads * self.linear_key_head_dim + self.value_dim

    @property
    def value_dim(self) -> int:
        """Width of the linear-attention output: value heads x their dimension."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def rope(self) -> Rope:
        """The rotary positions of the attention layers."""
        return Rope(self.rotary_dim, self.rope_theta)

    @property
    def rotary_dim(self) -> int:
        """How many leading dimensions of a head RoPE turns (even)."""
        return int(self.head_dim * self.partial_rotary_factor)

    def is_linear(self, layer: int) -> bool:
        """True when the mixer of ``layer`` is GatedDeltaNet, false for attention."""
        return self.layer_types[layer] == LINEAR

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Qwen35Config:
        """Read the raw config.json (multimodal or text-only).

        Raises ConfigError naming the key and the remedy for every missing, mistyped or impossible value,
        and for variants of the model that flashmoe does not compute.
        """
        fields = Fields(raw)
        _refuse_variants(fields)
        common = common_values(fields)
        heads = fields.integer("num_attention_heads")
        rope = fields.rope()
        dense = _dense_layers(fields, common["num_hidden_layers"])
        config = cls(
            **common,
            **_expert_values(fields),
            layer_types=_layer_types(fields, common["num_hidden_layers"]),
            num_attention_heads=heads,
            num_key_value_heads=fields.divisor_of("num_key_value_heads", heads, "num_attention_heads"),
            head_dim=fields.integer("head_dim", most=MAX_HEAD),
            linear_num_key_heads=fields.integer("linear_num_key_heads"),
            linear_num_value_heads=fields.integer("linear_num_value_heads"),
            linear_key_head_dim=fields.integer("linear_key_head_dim"),
            linear_value_head_dim=fields.integer("linear_value_head_dim"),
            linear_conv_kernel_dim=fields.integer("linear_conv_kernel_dim", least=2),
            intermediate_size=fields.integer("intermediate_size") if dense else None,
            dense_layers=dense,
            rope_theta=rope.positive("rope_theta"),
            partial_rotary_factor=_rotary_factor(fields, rope),
        )
        fields.divisor_of("linear_num_key_heads", config.linear_num_value_heads, "linear_num_value_heads")
        if config.rotary_dim % 2 or not config.rotary_dim:
            fields.refuse("partial_rotary_factor", f"must turn an even part of head_dim {config.head_dim}")
        return config


def _refuse_variants(fields: Fields) -> None:
    """Reject switches that change the mathematics; silence about them would give wrong text."""
    if fields.get("hidden_act") not in (None, "silu"):
        fields.refuse("hidden_act", "only silu is computed")
    if fields.boolean("attention_bias", default=False):
        fields.refuse("attention_bias", "only false is computed")
    if not fields.boolean("attn_output_gate", default=True):
        fields.refuse("attn_output_gate", "only true is computed")
    if _is_next(fields) and not fields.boolean("norm_topk_prob", default=True):
        fields.refuse("norm_topk_prob", "only true is computed")
    rope = fields.rope()
    if rope.get("rope_type") not in (None, "default"):
        rope.refuse("rope_type", "only default is computed")
    scaling = fields.get("rope_scaling")
    if scaling is not None and not (
        isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type", "default")) == "default"
    ):
        fields.refuse("rope_scaling", "only unscaled positions are computed")


def _is_next(fields: Fields) -> bool:
    return bool(fields.get("model_type") == "qwen3_next")


def _has_experts(fields: Fields) -> bool:
    """The dense models (0.8B to 27B) have the same mixers and plain feed-forward blocks."""
    return fields.get("model_type") not in ("qwen3_5", "qwen3_5_text")


def _expert_values(fields: Fields) -> dict[str, Any]:
    names = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
    if not _has_experts(fields):
        return dict.fromkeys(names, 0)
    return {name: fields.integer(name) for name in names} | {
        "num_experts_per_tok": fields.integer("num_experts_per_tok", most=fields.integer("num_experts"))
    }


def _layer_types(fields: Fields, num_layers: int) -> tuple[str, ...]:
    listed = fields.get("layer_types")
    if listed is None:
        interval = (
            4 if fields.get("full_attention_interval") is None else fields.integer("full_attention_interval")
        )
        return tuple(LINEAR if (i + 1) % interval else FULL for i in range(num_layers))
    if (
        not isinstance(listed, list)
        or len(listed) != num_layers
        or any(t not in (LINEAR, FULL) for t in listed)
    ):
        fields.refuse("layer_types", f"must list {LINEAR} or {FULL} for each of {num_layers} layers")
    return tuple(listed)


def _dense_layers(fields: Fields, num_layers: int) -> frozenset[int]:
    """qwen3_next may have plain FFN layers; in qwen3_5_moe every layer has experts whatever the file says."""
    if not _has_experts(fields):
        return frozenset(range(num_layers))
    if not _is_next(fields):
        return frozenset()
    step = 1 if fields.get("decoder_sparse_step") is None else fields.integer("decoder_sparse_step")
    only = fields.layer_list("mlp_only_layers")
    return frozenset(i for i in range(num_layers) if i in only or (i + 1) % step)


def _rotary_factor(fields: Fields, rope: Fields) -> float:
    """partial_rotary_factor from the rope object, else the top level, else the class default of a quarter."""
    owner = next((f for f in (rope, fields) if f.get("partial_rotary_factor") is not None), None)
    if owner is None:
        return 0.25
    value = owner.positive("partial_rotary_factor")
    if value > 1:
        owner.refuse("partial_rotary_factor", "must not exceed 1")
    return value
