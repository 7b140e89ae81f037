"""DeepSeek-V3 (`deepseek_v3`): latent attention, grouped sigmoid routing, ungated shared expert, dense first layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from flashmoe.models.architecture import Layer
from flashmoe.models.config import MAX_HEAD, Fields, ModelConfig, common_values
from flashmoe.models.names import assemble, ffn, norm, routed_experts, whole
from flashmoe.models.rope import rope_of, score_factor
from flashmoe.models.routing import first_dense_layers, grouped_mlp, grouped_routing
from flashmoe.models.spec import MatrixSource, MatrixSpec, ModelSpec, Order, Spec
from flashmoe.nn.latent_attention import LatentAttentionShape
from flashmoe.nn.moe import DenseShape, GroupedRouting, MoeShape
from flashmoe.nn.rotary import Rope

_DEFAULT_THETA = 10000.0
_LATENT_EPS = 1e-6  # of the latents' norms, whatever rms_norm_eps says
_WIDEST_LATENT = 640  # with its rotated part: what the kernels' buffers hold


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """Sizes are elements; q_lora_rank 0: queries come straight from the hidden row."""

    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    shared_intermediate_size: int
    routing: GroupedRouting
    rope: Rope
    rope_interleave: bool
    score_scale: float

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """See ModelConfig."""
        fields = Fields(raw)
        for key, computed in (
            ("hidden_act", "silu"),
            ("attention_bias", False),
            ("scoring_func", "sigmoid"),
            ("topk_method", "noaux_tc"),
            ("moe_layer_freq", 1),
        ):
            fields.refuse_unless(key, computed)
        common = common_values(fields)
        rotated, nope = (fields.integer(f"qk_{part}_head_dim", most=MAX_HEAD) for part in ("rope", "nope"))
        experts, size = fields.integer("n_routed_experts"), fields.integer("moe_intermediate_size")
        config = cls(
            **common,
            num_experts=experts,
            num_experts_per_tok=fields.integer("num_experts_per_tok", most=experts),
            moe_intermediate_size=size,
            dense_layers=first_dense_layers(fields),
            num_attention_heads=fields.integer("num_attention_heads"),
            q_lora_rank=0 if fields.get("q_lora_rank") is None else fields.integer("q_lora_rank"),
            kv_lora_rank=fields.integer("kv_lora_rank", most=_WIDEST_LATENT),
            qk_nope_head_dim=nope,
            v_head_dim=fields.integer("v_head_dim", most=MAX_HEAD),
            intermediate_size=fields.integer("intermediate_size"),
            shared_intermediate_size=size * fields.integer("n_shared_experts", most=64),
            routing=grouped_routing(fields, experts),
            rope=rope_of(fields, rotated, _DEFAULT_THETA),
            rope_interleave=fields.boolean("rope_interleave", default=True),
            score_scale=(nope + rotated) ** -0.5 * score_factor(fields),
        )
        config._check(fields)
        return config

    def _check(self, fields: Fields) -> None:
        """Sizes that the layout of the absorbed projections asks for, and the kernels' limits."""
        if self.rope.rotated % 2 or self.kv_lora_rank + self.rope.rotated > _WIDEST_LATENT:
            fields.refuse("qk_rope_head_dim", f"must be even and with kv_lora_rank at most {_WIDEST_LATENT}")
        for key, size, step in (
            ("v_head_dim", self.v_head_dim, 16),
            ("kv_lora_rank", self.kv_lora_rank, 32),
            ("qk_nope_head_dim", self.qk_nope_head_dim, 32),
        ):
            if size % step:
                fields.refuse(key, f"only multiples of {step} are computed")


def layers(config: Config) -> list[Layer]:
    """The blocks of every layer."""
    attention = LatentAttentionShape(
        config.hidden_size,
        config.num_attention_heads,
        config.q_lora_rank,
        config.kv_lora_rank,
        config.qk_nope_head_dim,
        config.v_head_dim,
        _LATENT_EPS,
        config.score_scale,
        config.rope,
        config.rope_interleave,
    )
    experts = MoeShape(
        config.hidden_size,
        config.num_experts,
        config.num_experts_per_tok,
        config.moe_intermediate_size,
        config.shared_intermediate_size,
        shared_gated=False,
        grouped=config.routing,
    )
    dense = DenseShape(config.hidden_size, config.intermediate_size)
    return [
        Layer(attention, dense if i in config.dense_layers else experts)
        for i in range(config.num_hidden_layers)
    ]


def model_spec(config: Config) -> ModelSpec:
    """All tensors of the model; those of multi-token prediction, a layer behind the last one, are known and unused."""
    spec = assemble(config, lambda layer: _layer(config, layer), lambda layer: routed_experts(config, layer))
    return ModelSpec(spec.resident, spec.experts, spec.tied, (f"layers.{config.num_hidden_layers}.",))


def _layer(config: Config, layer: int) -> Iterator[Spec]:
    yield from _self_attention(config, f"layers.{layer}.self_attn")
    hidden, mlp = config.hidden_size, f"layers.{layer}.mlp"
    if layer in config.dense_layers:
        yield ffn(f"{mlp}.dense", mlp, hidden, config.intermediate_size)
        return
    yield from grouped_mlp(config, mlp, config.shared_intermediate_size)


def _self_attention(config: Config, prefix: str) -> Iterator[Spec]:
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    queries = heads * (config.qk_nope_head_dim + config.rope.rotated)
    if config.q_lora_rank:
        yield whole(f"{prefix}.q_a_proj", config.q_lora_rank, hidden)
        yield norm(f"{prefix}.q_a_layernorm", config.q_lora_rank)
        yield whole(f"{prefix}.q_b_proj", queries, config.q_lora_rank)
    else:
        yield whole(f"{prefix}.q_proj", queries, hidden)
    yield whole(f"{prefix}.kv_a_proj_with_mqa", rank + config.rope.rotated, hidden)
    yield norm(f"{prefix}.kv_a_layernorm", rank)
    yield from _absorbed(config, prefix)
    yield whole(f"{prefix}.o_proj", hidden, heads * config.v_head_dim)


def _absorbed(config: Config, prefix: str) -> Iterator[Spec]:
    """kv_b_proj [heads * (nope + v), rank] as two: each head's keys turned [rank, nope], and its values [v, rank].

    GGUF and MLX have the two, as k_b_proj and v_b_proj, and as embed_q and unembed_out.
    """
    heads, rank, nope, value = (
        config.num_attention_heads,
        config.kv_lora_rank,
        config.qk_nope_head_dim,
        config.v_head_dim,
    )
    name, each = f"{prefix}.kv_b_proj", nope + value
    turned = Order(heads * each, rank, turned=each)
    keys = MatrixSource(name, heads * rank, nope, ((0, heads * rank),), turned)
    runs = tuple((head * each + nope, value) for head in range(heads))
    values = MatrixSource(name, heads * each, rank, runs)
    for module, source, others in (("k_b_proj", keys, "embed_q"), ("v_b_proj", values, "unembed_out")):
        apart = tuple(
            MatrixSource.whole(f"{prefix}.{other}", source.picked_rows, source.cols)
            for other in (module, others)
        )
        yield MatrixSpec(f"{prefix}.{module}", source, others=apart)
