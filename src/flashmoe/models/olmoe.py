"""OLMoE (`olmoe`): norms over all query heads and all key heads together, experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from flashmoe.models.config import Fields, common_values
from flashmoe.models.gqa import attention_biases, gqa_values
from flashmoe.models.qwen3_moe import Config as Qwen3MoeConfig
from flashmoe.models.qwen3_moe import layers, model_spec

__all__ = ["Config", "layers", "model_spec"]


@dataclass(frozen=True, kw_only=True)
class Config(Qwen3MoeConfig):
    """As Qwen3-MoE's; intermediate_size of the file is that of an expert."""

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """See ModelConfig."""
        fields = Fields(raw)
        fields.refuse_unless("hidden_act", "silu")
        if fields.get("clip_qkv") is not None:
            fields.refuse("clip_qkv", "only null is computed")
        experts = fields.integer(fields.first_key("num_experts", "num_local_experts"))
        return cls(
            **common_values(fields),
            **gqa_values(fields, norms="flat", biased=attention_biases(fields)),
            num_experts=experts,
            num_experts_per_tok=fields.integer("num_experts_per_tok", most=experts),
            moe_intermediate_size=fields.integer("intermediate_size"),
            intermediate_size=0,
            dense_layers=frozenset(),
            norm_topk_prob=fields.boolean("norm_topk_prob", default=False),
        )
