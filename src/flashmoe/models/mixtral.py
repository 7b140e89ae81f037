"""Mixtral (`mixtral`): plain grouped-query attention, experts in every layer, whose matrices have their own names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from flashmoe.models.architecture import Layer
from flashmoe.models.config import Fields, common_values
from flashmoe.models.gqa import GqaConfig, gqa_layers, gqa_spec, gqa_values, same_window
from flashmoe.models.names import routed_experts
from flashmoe.models.spec import MatrixSource, MatrixSpec, ModelSpec, Spec
from flashmoe.nn.moe import MoeShape

_THETA = 1e6
_MLP = "block_sparse_moe"


@dataclass(frozen=True, kw_only=True)
class Config(GqaConfig):
    """See GqaConfig; intermediate_size of the file is that of an expert."""

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """See ModelConfig."""
        fields = Fields(raw)
        fields.refuse_unless("hidden_act", "silu")
        experts = fields.integer(fields.first_key("num_local_experts", "num_experts"))
        return cls(
            **common_values(fields),
            **gqa_values(fields, windows=same_window(fields), theta=_THETA),
            num_experts=experts,
            num_experts_per_tok=fields.integer("num_experts_per_tok", most=experts),
            moe_intermediate_size=fields.integer("intermediate_size"),
            intermediate_size=0,
            dense_layers=frozenset(),
        )


def layers(config: Config) -> list[Layer]:
    """The blocks of every layer."""
    experts = MoeShape(
        config.hidden_size,
        config.num_experts,
        config.num_experts_per_tok,
        config.moe_intermediate_size,
        shared_intermediate=0,
    )
    return gqa_layers(config, experts)


def model_spec(config: Config) -> ModelSpec:
    """All tensors of the model."""

    def router(prefix: str) -> Iterator[Spec]:
        module = prefix.removesuffix("mlp") + f"{_MLP}.gate"
        source = MatrixSource.whole(module, config.num_experts, config.hidden_size)
        yield MatrixSpec(f"{prefix}.gate", source, "sensitive")

    return gqa_spec(config, router, lambda layer: routed_experts(config, layer, _MLP, ("w1", "w3", "w2")))
