"""Hyper-parameters of qwen3_5_moe and qwen3_next, read from config.json and checked once."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashmoe.errors import ConfigError

LINEAR, FULL = "linear_attention", "full_attention"
_MAX_INT = 1 << 31
_MAX_FLOAT = 1e30  # float32 holds it, and an integer of JSON may be too long for any float
# Lists and tables grow with these before a tensor is compared with them; real models have 94 layers, heads of 256.
_MAX_LAYERS, _MAX_HEAD = 1 << 12, 1 << 12


@dataclass(frozen=True)
class Qwen35Config:
    """The text model.  Sizes are elements; ``layer_types`` has one of LINEAR, FULL per layer."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    layer_types: tuple[str, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    intermediate_size: int | None
    dense_layers: frozenset[int]
    rms_norm_eps: float
    rope_theta: float
    partial_rotary_factor: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    norm_topk_prob: bool
    eos_token_ids: tuple[int, ...]

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution: q, k and v of all linear-attention heads."""
        return 2 * self.linear_num_key_heads * self.linear_key_head_dim + self.value_dim

    @property
    def value_dim(self) -> int:
        """Width of the linear-attention output: value heads x their dimension."""
        return self.linear_num_value_heads * self.linear_value_head_dim

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
        fields = _Fields(raw)
        _refuse_variants(fields)
        num_layers = fields.integer("num_hidden_layers", most=_MAX_LAYERS)
        num_experts = fields.integer("num_experts")
        heads = fields.integer("num_attention_heads")
        rope = fields.rope()
        dense = _dense_layers(fields, num_layers)
        config = cls(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            num_hidden_layers=num_layers,
            layer_types=_layer_types(fields, num_layers),
            num_attention_heads=heads,
            num_key_value_heads=fields.divisor_of("num_key_value_heads", heads, "num_attention_heads"),
            head_dim=fields.integer("head_dim", most=_MAX_HEAD),
            linear_num_key_heads=fields.integer("linear_num_key_heads"),
            linear_num_value_heads=fields.integer("linear_num_value_heads"),
            linear_key_head_dim=fields.integer("linear_key_head_dim"),
            linear_value_head_dim=fields.integer("linear_value_head_dim"),
            linear_conv_kernel_dim=fields.integer("linear_conv_kernel_dim", least=2),
            num_experts=num_experts,
            num_experts_per_tok=fields.integer("num_experts_per_tok", most=num_experts),
            moe_intermediate_size=fields.integer("moe_intermediate_size"),
            shared_expert_intermediate_size=fields.integer("shared_expert_intermediate_size"),
            intermediate_size=fields.integer("intermediate_size") if dense else None,
            dense_layers=dense,
            rms_norm_eps=fields.positive("rms_norm_eps"),
            rope_theta=rope.positive("rope_theta"),
            partial_rotary_factor=_rotary_factor(fields, rope),
            max_position_embeddings=fields.integer("max_position_embeddings"),
            tie_word_embeddings=fields.boolean("tie_word_embeddings", default=False),
            norm_topk_prob=fields.boolean("norm_topk_prob", default=True) if fields.is_next else True,
            eos_token_ids=fields.token_ids("eos_token_id"),
        )
        fields.divisor_of("linear_num_key_heads", config.linear_num_value_heads, "linear_num_value_heads")
        if config.rotary_dim % 2 or not config.rotary_dim:
            fields.refuse("partial_rotary_factor", f"must turn an even part of head_dim {config.head_dim}")
        return config


class _Fields:
    """Checked look-ups in a config object; ``prefix`` is how the user finds the key in config.json."""

    def __init__(self, raw: Mapping[str, Any], prefix: str = "") -> None:
        text = raw.get("text_config")
        self._nested = isinstance(text, dict)
        self._table: Mapping[str, Any] = {**raw, **text} if isinstance(text, dict) else raw
        self._prefix = "text_config." if self._nested else prefix
        self.is_next = self._table.get("model_type") == "qwen3_next"

    def get(self, key: str) -> Any:
        return self._table.get(key)

    def refuse(self, key: str, rule: str) -> Any:
        value = self._table.get(key)
        found = "is missing" if value is None else f"is {reprlib.repr(value)}"
        raise ConfigError(
            f"config.json: {self._prefix}{key} {found}, {rule}: use the model's own config.json, unchanged"
        )

    def integer(self, key: str, least: int = 1, most: int = _MAX_INT) -> int:
        value = self._table.get(key)
        if type(value) is not int or not least <= value <= most:
            self.refuse(key, f"must be an integer from {least} to {most}")
        return int(value)  # type: ignore[arg-type]

    def positive(self, key: str) -> float:
        value = self._table.get(key)
        if type(value) not in (int, float) or not 0 < value <= _MAX_FLOAT:  # type: ignore[operator]
            self.refuse(key, "must be a positive number")
        return float(value)  # type: ignore[arg-type]

    def boolean(self, key: str, default: bool) -> bool:
        value = self._table.get(key)
        if value is not None and not isinstance(value, bool):
            self.refuse(key, "must be true or false")
        return default if value is None else bool(value)

    def divisor_of(self, key: str, whole: int, whole_key: str) -> int:
        value = self.integer(key)
        if whole % value:
            self.refuse(key, f"must divide {whole_key} = {whole}")
        return value

    def layer_list(self, key: str) -> list[int]:
        value = self._table.get(key)
        if value is not None and not (isinstance(value, list) and all(type(v) is int for v in value)):
            self.refuse(key, "must be a list of layer numbers")
        return value or []

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self._table.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(type(token) is not int or token < 0 for token in ids):
            self.refuse(key, "must be a token id or a list of them")
        return tuple(ids)

    def rope(self) -> _Fields:
        """The rope keys: rope_parameters where the file has it, else the top level."""
        value = self._table.get("rope_parameters")
        if value is None:
            return self
        if not isinstance(value, dict):
            self.refuse("rope_parameters", "must be an object")
        return _Fields(value, f"{self._prefix}rope_parameters.")


def _refuse_variants(fields: _Fields) -> None:
    """Reject switches that change the mathematics; silence about them would give wrong text."""
    if fields.get("hidden_act") not in (None, "silu"):
        fields.refuse("hidden_act", "only silu is computed")
    if fields.boolean("attention_bias", default=False):
        fields.refuse("attention_bias", "only false is computed")
    if not fields.boolean("attn_output_gate", default=True):
        fields.refuse("attn_output_gate", "only true is computed")
    if fields.is_next and not fields.boolean("norm_topk_prob", default=True):
        fields.refuse("norm_topk_prob", "only true is computed")
    rope = fields.rope()
    if rope.get("rope_type") not in (None, "default"):
        rope.refuse("rope_type", "only default is computed")
    scaling = fields.get("rope_scaling")
    if scaling is not None and not (
        isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type", "default")) == "default"
    ):
        fields.refuse("rope_scaling", "only unscaled positions are computed")


def _layer_types(fields: _Fields, num_layers: int) -> tuple[str, ...]:
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


def _dense_layers(fields: _Fields, num_layers: int) -> frozenset[int]:
    """qwen3_next may have plain FFN layers; in qwen3_5_moe every layer is MoE whatever the file says."""
    if not fields.is_next:
        return frozenset()
    step = 1 if fields.get("decoder_sparse_step") is None else fields.integer("decoder_sparse_step")
    only = fields.layer_list("mlp_only_layers")
    return frozenset(i for i in range(num_layers) if i in only or (i + 1) % step)


def _rotary_factor(fields: _Fields, rope: _Fields) -> float:
    """partial_rotary_factor from the rope object, else the top level, else the class default of a quarter."""
    owner = next((f for f in (rope, fields) if f.get("partial_rotary_factor") is not None), None)
    if owner is None:
        return 0.25
    value = owner.positive("partial_rotary_factor")
    if value > 1:
        owner.refuse("partial_rotary_factor", "must not exceed 1")
    return value
