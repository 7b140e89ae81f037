"""Qwen3-MoE (`qwen3_moe`): a norm on each query and key head, experts in all or some layers, none of them shared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from flashmoe.models.architecture import Layer
from flashmoe.models.config import Fields, common_values
from flashmoe.models.gqa import (
    GqaConfig,
    attention_biases,
    gqa_layers,
    gqa_spec,
    gqa_values,
    plain_layers,
    same_window,
)
from flashmoe.models.names import sensitive
from flashmoe.models.spec import ModelSpec
from flashmoe.nn.moe import MoeShape


@dataclass(frozen=True, kw_only=True)
class Config(GqaConfig):
    """norm_topk_prob: the weights of the chosen experts are made to sum to one."""

    norm_topk_prob: bool

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """See ModelConfig."""
        fields = Fields(raw)
        fields.refuse_unless("hidden_act", "silu")
        dense = plain_layers(fields)
        experts = fields.integer(fields.first_key("num_experts", "num_local_experts"))
        windowed = fields.boolean("use_sliding_window", default=False)
        return cls(
            **common_values(fields),
            **gqa_values(
                fields,
                norms="head",
                biased=attention_biases(fields),
                windows=same_window(fields) if windowed else None,
            ),
            num_experts=experts,
            num_experts_per_tok=fields.integer("num_experts_per_tok", most=experts),
            moe_intermediate_size=fields.integer("moe_intermediate_size"),
            intermediate_size=fields.integer("intermediate_size") if dense else 0,
            dense_layers=dense,
            norm_topk_prob=fields.boolean("norm_topk_prob", default=False),
        )


def layers(config: Config) -> list[Layer]:
    """The blocks of every layer."""
    experts = MoeShape(
        config.hidden_size,
        config.num_experts,
        config.num_experts_per_tok,
        config.moe_intermediate_size,
        shared_intermediate=0,
        renormalised=config.norm_topk_prob,
    )
    return gqa_layers(config, experts)


def model_spec(config: Config) -> ModelSpec:
    """All tensors of the model."""
    return gqa_spec(
        config, lambda prefix: iter([sensitive(f"{prefix}.gate", config.num_experts, config.hidden_size)])
    )
