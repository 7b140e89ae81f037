"""Name map of qwen3_5_moe and qwen3_5: which checkpoint tensor becomes which bundle tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from flashmoe.models.names import assemble, ffn, norm, routed_experts, sensitive, whole
from flashmoe.models.qwen3_5_config import Qwen35Config
from flashmoe.models.spec import ModelSpec, Spec, VectorSpec

LinearProjections = Callable[[Qwen35Config, str], Iterator[Spec]]


def model_spec(config: Qwen35Config) -> ModelSpec:
    """All tensors of a qwen3_5_moe or qwen3_5 bundle."""
    return assemble_qwen(config, _linear_projections, stacked=True)


def assemble_qwen(config: Qwen35Config, linear_projections: LinearProjections, *, stacked: bool) -> ModelSpec:
    """The model with the given ways of storing the linear-attention input projections and the experts."""
    return assemble(
        config,
        lambda layer: _layer(config, layer, linear_projections),
        lambda layer: routed_experts(config, layer, stacked=stacked),
        zero_centred=True,
    )


def _layer(config: Qwen35Config, layer: int, linear_projections: LinearProjections) -> Iterator[Spec]:
    prefix = f"layers.{layer}"
    if config.is_linear(layer):
        yield from linear_projections(config, f"{prefix}.linear_attn")
        yield from _linear_attention(config, f"{prefix}.linear_attn")
    else:
        yield from _self_attention(config, f"{prefix}.self_attn")
    yield from _mlp(config, f"{prefix}.mlp", layer in config.dense_layers)


def _linear_projections(config: Qwen35Config, prefix: str) -> Iterator[Spec]:
    hidden, heads = config.hidden_size, config.linear_num_value_heads
    yield whole(f"{prefix}.in_proj_qkv", config.conv_dim, hidden)
    yield whole(f"{prefix}.in_proj_z", config.value_dim, hidden)
    yield sensitive(f"{prefix}.in_proj_b", heads, hidden)
    yield sensitive(f"{prefix}.in_proj_a", heads, hidden)


def _linear_attention(config: Qwen35Config, prefix: str) -> Iterator[Spec]:
    heads = config.linear_num_value_heads
    conv_shape = (config.conv_dim, config.linear_conv_kernel_dim)
    yield whole(f"{prefix}.out_proj", config.hidden_size, config.value_dim)
    yield VectorSpec(f"{prefix}.conv1d", f"{prefix}.conv1d.weight", conv_shape)
    yield VectorSpec(f"{prefix}.A_log", f"{prefix}.A_log", (heads,))
    yield VectorSpec(f"{prefix}.dt_bias", f"{prefix}.dt_bias", (heads,))
    yield norm(f"{prefix}.norm", config.linear_value_head_dim)


def _self_attention(config: Qwen35Config, prefix: str) -> Iterator[Spec]:
    hidden, dim = config.hidden_size, config.head_dim
    query, kv = config.num_attention_heads * dim, config.num_key_value_heads * dim
    yield whole(f"{prefix}.q_proj", 2 * query, hidden)
    yield whole(f"{prefix}.k_proj", kv, hidden)
    yield whole(f"{prefix}.v_proj", kv, hidden)
    yield whole(f"{prefix}.o_proj", hidden, query)
    for name in ("q_norm", "k_norm"):
        yield norm(f"{prefix}.{name}", dim, zero_centred=True)


def _mlp(config: Qwen35Config, prefix: str, dense: bool) -> Iterator[Spec]:
    hidden = config.hidden_size
    if dense:
        size = config.intermediate_size or 0  # the config requires it wherever a layer is dense
        yield ffn(f"{prefix}.dense", prefix, hidden, size)
        return
    size = config.shared_expert_intermediate_size
    yield sensitive(f"{prefix}.gate", config.num_experts, hidden)
    yield sensitive(f"{prefix}.shared_expert_gate", 1, hidden)
    yield ffn(f"{prefix}.shared_expert", f"{prefix}.shared_expert", hidden, size)
