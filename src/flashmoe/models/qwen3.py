"""Qwen3 (`qwen3`): dense, a norm on each query and key head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from flashmoe.models.config import Fields
from flashmoe.models.gqa import (
    GqaConfig,
    attention_biases,
    dense_values,
    gqa_layers,
    gqa_spec,
    gqa_values,
    upper_windows,
)

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
        attention = gqa_values(
            fields, norms="head", biased=attention_biases(fields), windows=upper_windows(fields)
        )
        return cls(**dense_values(fields), **attention)
