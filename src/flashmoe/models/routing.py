"""Sigmoid routing in groups, as DeepSeek-V3 and GLM-4.5 configure and name it."""

from __future__ import annotations

from collections.abc import Iterator

from flashmoe.models.config import Fields, ModelConfig
from flashmoe.models.names import ffn, sensitive
from flashmoe.models.spec import Spec, VectorSpec
from flashmoe.nn.moe import GroupedRouting


def grouped_routing(fields: Fields, experts: int) -> GroupedRouting:
    """n_group, topk_group, norm_topk_prob and routed_scaling_factor.  Raises ConfigError."""
    groups = (
        1 if fields.get("n_group") is None else fields.divisor_of("n_group", experts, "the routed experts")
    )
    best = groups if fields.get("topk_group") is None else fields.integer("topk_group", most=groups)
    scale = 1.0 if fields.get("routed_scaling_factor") is None else fields.positive("routed_scaling_factor")
    most = experts // groups * best
    if fields.integer("num_experts_per_tok") > most:
        fields.refuse("num_experts_per_tok", f"must be at most the {most} experts of the best groups")
    return GroupedRouting(groups, best, fields.boolean("norm_topk_prob", default=True), scale)


def first_dense_layers(fields: Fields) -> frozenset[int]:
    """first_k_dense_replace: so many leading layers have no experts."""
    if fields.get("first_k_dense_replace") is None:
        return frozenset()
    return frozenset(range(min(fields.integer("first_k_dense_replace", least=0), fields.layer_count())))


def grouped_mlp(config: ModelConfig, prefix: str, shared: int) -> Iterator[Spec]:
    """Router, its correction bias, and the shared expert of `shared` rows between its products, 0 for none."""
    yield sensitive(f"{prefix}.gate", config.num_experts, config.hidden_size)
    bias = f"{prefix}.gate.e_score_correction_bias"
    yield VectorSpec(bias, bias, (config.num_experts,))
    if shared:
        yield ffn(f"{prefix}.shared_expert", f"{prefix}.shared_experts", config.hidden_size, shared)
