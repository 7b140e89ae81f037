"""Llama (`llama`): dense, plain grouped-query attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from flashmoe.models.config import Fields
from flashmoe.models.gqa import GqaConfig, attention_biases, dense_values, gqa_layers, gqa_spec, gqa_values

__all__ = ["Config", "layers", "model_spec"]

layers, model_spec = gqa_layers, gqa_spec


@dataclass(frozen=True, kw_only=True)
class Config(GqaConfig):
    """See GqaConfig."""

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """See ModelConfig."""
        fields = Fields(raw)
        fields.refuse_unless("hidden_act", "silu")
        fields.refuse_unless("mlp_bias", False)
        return cls(**dense_values(fields), **gqa_values(fields, biased=attention_biases(fields)))
