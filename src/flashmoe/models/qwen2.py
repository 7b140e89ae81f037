"""Qwen2 and Qwen2.5 (`qwen2`): dense, biases on queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from flashmoe.models.config import Fields
from flashmoe.models.gqa import GqaConfig, dense_values, gqa_layers, gqa_spec, gqa_values, upper_windows

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
        return cls(**dense_values(fields), **gqa_values(fields, biased="qkv", windows=upper_windows(fields)))
