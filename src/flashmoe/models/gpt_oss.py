"""gpt-oss (`gpt_oss`): attention with sinks, over a window in every other layer; experts with biases, clamped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from flashmoe.bundle.codecs import ClampedGlu
from flashmoe.models.architecture import Layer
from flashmoe.models.config import MAX_HEAD, Fields, ModelConfig, common_values
from flashmoe.models.names import assemble, whole
from flashmoe.models.rope import rope_of
from flashmoe.models.spec import (
    BiasSource,
    ExpertsSpec,
    FfnSource,
    MatrixSource,
    MatrixSpec,
    ModelSpec,
    Order,
    Spec,
    VectorSpec,
)
from flashmoe.nn.attention import AttentionShape
from flashmoe.nn.moe import MoeShape
from flashmoe.nn.rotary import Rope

_SLIDING, _FULL = "sliding_attention", "full_attention"
_DEFAULT_THETA, _DEFAULT_ALPHA, _DEFAULT_LIMIT = 150000.0, 1.702, 7.0


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """Sizes are elements; windows has the positions that a token sees in each layer, 0 for all."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    windows: tuple[int, ...]
    glu: ClampedGlu
    rope: Rope

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """See ModelConfig."""
        fields = Fields(raw)
        fields.refuse_unless("hidden_act", "silu")
        fields.refuse_unless("attention_bias", True)
        common = common_values(fields)
        heads, head_dim = fields.integer("num_attention_heads"), fields.integer("head_dim", most=MAX_HEAD)
        experts = fields.integer("num_local_experts")
        per_token = "num_experts_per_tok"
        if fields.get(per_token) is None:
            per_token = "experts_per_token"
        return cls(
            **common,
            num_experts=experts,
            num_experts_per_tok=fields.integer(per_token, most=experts),
            moe_intermediate_size=fields.integer("intermediate_size"),
            dense_layers=frozenset(),
            num_attention_heads=heads,
            num_key_value_heads=fields.divisor_of("num_key_value_heads", heads, "num_attention_heads"),
            head_dim=head_dim,
            windows=_windows(fields, common["num_hidden_layers"]),
            glu=ClampedGlu(
                _DEFAULT_ALPHA if fields.get("swiglu_alpha") is None else fields.positive("swiglu_alpha"),
                _DEFAULT_LIMIT if fields.get("swiglu_limit") is None else fields.positive("swiglu_limit"),
            ),
            rope=rope_of(fields, head_dim, _DEFAULT_THETA),
        )


def layers(config: Config) -> list[Layer]:
    """The blocks of every layer."""
    experts = MoeShape(
        config.hidden_size,
        config.num_experts,
        config.num_experts_per_tok,
        config.moe_intermediate_size,
        shared_intermediate=0,
        router_biased=True,
    )
    return [Layer(_attention(config, window), experts) for window in config.windows]


def model_spec(config: Config) -> ModelSpec:
    """All tensors of the model."""
    return assemble(
        config, lambda layer: _layer(config, f"layers.{layer}"), lambda layer: _experts(config, layer)
    )


def _windows(fields: Fields, count: int) -> tuple[int, ...]:
    kinds = fields.get("layer_types")
    if kinds is None:
        kinds = [_FULL if i % 2 else _SLIDING for i in range(count)]
    if (
        not isinstance(kinds, list)
        or len(kinds) != count
        or any(kind not in (_SLIDING, _FULL) for kind in kinds)
    ):
        fields.refuse("layer_types", f"must list {_SLIDING} or {_FULL} for each of {count} layers")
    window = fields.integer("sliding_window") if _SLIDING in kinds else 0
    return tuple(window if kind == _SLIDING else 0 for kind in kinds)


def _attention(config: Config, window: int) -> AttentionShape:
    return AttentionShape(
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.rms_norm_eps,
        config.rope,
        gated=False,
        normed=False,
        biased="qkvo",
        window=window,
        sinks=True,
    )


def _layer(config: Config, prefix: str) -> Iterator[Spec]:
    hidden, dim = config.hidden_size, config.head_dim
    query, kv = config.num_attention_heads * dim, config.num_key_value_heads * dim
    attention = f"{prefix}.self_attn"
    for name, rows, cols in (
        ("q", query, hidden),
        ("k", kv, hidden),
        ("v", kv, hidden),
        ("o", hidden, query),
    ):
        yield whole(f"{attention}.{name}_proj", rows, cols)
        yield VectorSpec(f"{attention}.{name}_proj.bias", f"{attention}.{name}_proj.bias", (rows,))
    yield VectorSpec(f"{attention}.sinks", f"{attention}.sinks", (config.num_attention_heads,))
    router = MatrixSource.whole(f"{prefix}.mlp.router", config.num_experts, hidden)
    yield MatrixSpec(f"{prefix}.mlp.gate", router, "sensitive")
    yield VectorSpec(f"{prefix}.mlp.gate.bias", f"{prefix}.mlp.router.bias", (config.num_experts,))


def _experts(config: Config, layer: int) -> ExpertsSpec:
    count, hidden, size = config.num_experts, config.hidden_size, config.moe_intermediate_size
    mlp = f"layers.{layer}.mlp.experts"

    def biases(e: int) -> tuple[BiasSource, BiasSource, BiasSource]:
        gate, up = (BiasSource(f"{mlp}.gate_up_proj_bias", count, 2 * size, e, i, 2) for i in (0, 1))
        return gate, up, BiasSource(f"{mlp}.down_proj_bias", count, hidden, e)

    def source(e: int, gate_up: Order, down: Order | None, mark: str = "") -> FfnSource:
        name, rows = f"{mlp}.gate_up_proj", 2 * count * size
        return FfnSource(
            MatrixSource(name, rows, hidden, ((2 * e * size, size),), gate_up),
            MatrixSource(name, rows, hidden, (((2 * e + 1) * size, size),), gate_up),
            MatrixSource(f"{mlp}.down_proj", count * hidden, size, ((e * hidden, hidden),), down),
            biases(e),
            mark,
        )

    def packed(e: int) -> FfnSource:
        """MXFP4: [E, 2I, H] and [E, H, I] as they are wanted, but for gate and up in turns."""
        order = Order(2 * count * size, hidden, woven=2 * size)
        return source(e, order, None, f"{mlp}.gate_up_proj_blocks")

    def turned(e: int) -> FfnSource:
        """Floats: [E, H, 2I] and [E, I, H]."""
        gate_up = Order(count * hidden, 2 * size, turned=hidden, woven=2 * size)
        return source(e, gate_up, Order(count * size, hidden, turned=size))

    def switch(e: int) -> FfnSource:
        """MLX and GGUF: three stacked matrices [E, rows, cols] with biases [E, rows]."""
        rows = {"gate": size, "up": size, "down": hidden}
        gate, up, down = (
            MatrixSource(f"{mlp}.{name}_proj", count * n, size if name == "down" else hidden, ((e * n, n),))
            for name, n in rows.items()
        )
        first, second, last = (BiasSource(f"{mlp}.{name}_proj.bias", count, n, e) for name, n in rows.items())
        return FfnSource(gate, up, down, (first, second, last))

    return ExpertsSpec(layer, count, hidden, size, (packed, turned, switch), turned, config.glu, biased=True)
