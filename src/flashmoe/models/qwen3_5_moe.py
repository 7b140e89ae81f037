"""Qwen3.5-MoE (`qwen3_5_moe`), text only: Gated DeltaNet and gated attention in turns, every layer with experts."""

from __future__ import annotations

from flashmoe.models.architecture import Layer
from flashmoe.models.qwen3_5_config import Qwen35Config as Config
from flashmoe.models.qwen3_5_names import model_spec
from flashmoe.nn.attention import AttentionShape
from flashmoe.nn.delta_net import DeltaNetShape
from flashmoe.nn.moe import DenseShape, MoeShape

__all__ = ["Config", "layers", "model_spec"]


def layers(config: Config) -> list[Layer]:
    """The blocks of every layer."""
    attention, recurrence, experts = _attention(config), _delta_net(config), _experts(config)
    dense = DenseShape(config.hidden_size, config.intermediate_size or 0)  # required where a layer is dense
    return [
        Layer(
            recurrence if config.is_linear(i) else attention, dense if i in config.dense_layers else experts
        )
        for i in range(config.num_hidden_layers)
    ]


def _attention(config: Config) -> AttentionShape:
    return AttentionShape(
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.rms_norm_eps,
        config.rope,
    )


def _delta_net(config: Config) -> DeltaNetShape:
    return DeltaNetShape(
        config.hidden_size,
        config.linear_num_key_heads,
        config.linear_num_value_heads,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
        config.linear_conv_kernel_dim,
        config.rms_norm_eps,
    )


def _experts(config: Config) -> MoeShape:
    return MoeShape(
        config.hidden_size,
        config.num_experts,
        config.num_experts_per_tok,
        config.moe_intermediate_size,
        config.shared_expert_intermediate_size,
    )
