"""GLM-4.5 (`glm4_moe`): grouped sigmoid routing, an ungated shared expert, dense first layers, half a head turned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from flashmoe.models.architecture import Layer
from flashmoe.models.config import Fields, common_values
from flashmoe.models.gqa import GqaConfig, attention_biases, gqa_layers, gqa_spec, gqa_values
from flashmoe.models.routing import first_dense_layers, grouped_mlp, grouped_routing
from flashmoe.models.spec import ModelSpec, Spec
from flashmoe.nn.moe import GroupedRouting, MoeShape

_PARTIAL = 0.5


@dataclass(frozen=True, kw_only=True)
class Config(GqaConfig):
    """shared_intermediate_size: of the shared expert, 0 where there is none."""

    shared_intermediate_size: int
    routing: GroupedRouting

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """See ModelConfig."""
        fields = Fields(raw)
        fields.refuse_unless("hidden_act", "silu")
        experts = fields.integer(fields.first_key("n_routed_experts", "num_local_experts"))
        size = fields.integer("moe_intermediate_size")
        norms = fields.boolean("use_qk_norm", default=False)
        dense = first_dense_layers(fields)
        return cls(
            **common_values(fields),
            **gqa_values(
                fields,
                norms="head" if norms else "none",
                biased=attention_biases(fields, "qkv"),
                partial=_PARTIAL,
            ),
            num_experts=experts,
            num_experts_per_tok=fields.integer("num_experts_per_tok", most=experts),
            moe_intermediate_size=size,
            intermediate_size=fields.integer("intermediate_size") if dense else 0,
            dense_layers=dense,
            shared_intermediate_size=size * fields.integer("n_shared_experts", least=0, most=64),
            routing=grouped_routing(fields, experts),
        )


def layers(config: Config) -> list[Layer]:
    """The blocks of every layer."""
    experts = MoeShape(
        config.hidden_size,
        config.num_experts,
        config.num_experts_per_tok,
        config.moe_intermediate_size,
        config.shared_intermediate_size,
        shared_gated=False,
        grouped=config.routing,
    )
    return gqa_layers(config, experts)


def model_spec(config: Config) -> ModelSpec:
    """All tensors of the model; those of multi-token prediction, a layer behind the last one, are known and unused."""

    def mlp(prefix: str) -> Iterator[Spec]:
        return grouped_mlp(config, prefix, config.shared_intermediate_size)

    return replace(gqa_spec(config, mlp), unused=(f"layers.{config.num_hidden_layers}.",))
