"""Name map of qwen3_5_moe: which checkpoint tensor becomes which bundle tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from flashmoe.models.qwen3_5_config import Qwen35Config
from flashmoe.models.spec import (
    ExpertsSpec,
    FfnSource,
    FfnSpec,
    MatrixSource,
    MatrixSpec,
    ModelSpec,
    Spec,
    VectorSpec,
)

LinearProjections = Callable[[Qwen35Config, str], Iterator[Spec]]


def model_spec(config: Qwen35Config) -> ModelSpec:
    """All tensors of a qwen3_5_moe bundle."""
    return assemble(config, _linear_projections)


def assemble(config: Qwen35Config, linear_projections: LinearProjections) -> ModelSpec:
    """The model with the given way of storing the linear-attention input projections."""
    hidden, vocab = config.hidden_size, config.vocab_size
    resident: list[Spec] = [VectorSpec("norm", "norm.weight", (hidden,), zero_centred=True)]
    for layer in range(config.num_hidden_layers):
        resident += _layer(config, layer, linear_projections)
    if not config.tie_word_embeddings:
        resident.append(MatrixSpec("lm_head", MatrixSource.whole("lm_head", vocab, hidden)))
    resident.append(MatrixSpec("embed_tokens", MatrixSource.whole("embed_tokens", vocab, hidden)))
    moe_layers = [i for i in range(config.num_hidden_layers) if i not in config.dense_layers]
    return ModelSpec(
        tuple(resident), tuple(_experts(config, i) for i in moe_layers), config.tie_word_embeddings
    )


def whole(name: str, rows: int, cols: int) -> MatrixSpec:
    """A matrix that keeps its name."""
    return MatrixSpec(name, MatrixSource.whole(name, rows, cols))


def sensitive(name: str, rows: int, cols: int) -> MatrixSpec:
    """A matrix that keeps its name and eight bits."""
    return MatrixSpec(name, MatrixSource.whole(name, rows, cols), "sensitive")


def _layer(config: Qwen35Config, layer: int, linear_projections: LinearProjections) -> Iterator[Spec]:
    prefix = f"layers.{layer}"
    for norm in ("input_layernorm", "post_attention_layernorm"):
        name = f"{prefix}.{norm}"
        yield VectorSpec(name, f"{name}.weight", (config.hidden_size,), zero_centred=True)
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
    yield VectorSpec(f"{prefix}.norm", f"{prefix}.norm.weight", (config.linear_value_head_dim,))


def _self_attention(config: Qwen35Config, prefix: str) -> Iterator[Spec]:
    hidden, dim = config.hidden_size, config.head_dim
    query, kv = config.num_attention_heads * dim, config.num_key_value_heads * dim
    yield whole(f"{prefix}.q_proj", 2 * query, hidden)
    yield whole(f"{prefix}.k_proj", kv, hidden)
    yield whole(f"{prefix}.v_proj", kv, hidden)
    yield whole(f"{prefix}.o_proj", hidden, query)
    for norm in ("q_norm", "k_norm"):
        yield VectorSpec(f"{prefix}.{norm}", f"{prefix}.{norm}.weight", (dim,), zero_centred=True)


def _mlp(config: Qwen35Config, prefix: str, dense: bool) -> Iterator[Spec]:
    hidden = config.hidden_size
    if dense:
        size = config.intermediate_size or 0  # the config requires it wherever a layer is dense
        yield FfnSpec(f"{prefix}.dense", hidden, size, _ffn_source(prefix, hidden, size))
        return
    size = config.shared_expert_intermediate_size
    yield sensitive(f"{prefix}.gate", config.num_experts, hidden)
    yield sensitive(f"{prefix}.shared_expert_gate", 1, hidden)
    name = f"{prefix}.shared_expert"
    yield FfnSpec(name, hidden, size, _ffn_source(name, hidden, size))


def _ffn_source(prefix: str, hidden: int, size: int) -> FfnSource:
    return FfnSource(
        MatrixSource.whole(f"{prefix}.gate_proj", size, hidden),
        MatrixSource.whole(f"{prefix}.up_proj", size, hidden),
        MatrixSource.whole(f"{prefix}.down_proj", hidden, size),
    )


def _experts(config: Qwen35Config, layer: int) -> ExpertsSpec:
    count, hidden, size = config.num_experts, config.hidden_size, config.moe_intermediate_size
    mlp = f"layers.{layer}.mlp"

    def fused(e: int) -> FfnSource:
        """gate_up_proj [E, 2I, H]: the first I rows of an expert are its gate."""
        name, rows = f"{mlp}.experts.gate_up_proj", count * 2 * size
        return FfnSource(
            MatrixSource(name, rows, hidden, ((2 * e * size, size),)),
            MatrixSource(name, rows, hidden, (((2 * e + 1) * size, size),)),
            MatrixSource(f"{mlp}.experts.down_proj", count * hidden, size, ((e * hidden, hidden),)),
        )

    def single(e: int) -> FfnSource:
        return _ffn_source(f"{mlp}.experts.{e}", hidden, size)

    def switch(e: int) -> FfnSource:
        """MLX: three stacked matrices [E, rows, cols]."""
        name = f"{mlp}.switch_mlp"
        return FfnSource(
            MatrixSource(f"{name}.gate_proj", count * size, hidden, ((e * size, size),)),
            MatrixSource(f"{name}.up_proj", count * size, hidden, ((e * size, size),)),
            MatrixSource(f"{name}.down_proj", count * hidden, size, ((e * hidden, hidden),)),
        )

    return ExpertsSpec(layer, count, hidden, size, (fused, single, switch))
