"""What the families of plain grouped-query attention share: configuration, names and blocks but for their experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from flashmoe.models.architecture import Layer
from flashmoe.models.config import MAX_HEAD, Fields, ModelConfig, common_values
from flashmoe.models.names import assemble, ffn, norm, routed_experts, whole
from flashmoe.models.rope import rope_of, rotated_part
from flashmoe.models.spec import ExpertsSpec, ModelSpec, Spec, VectorSpec
from flashmoe.nn.attention import AttentionShape
from flashmoe.nn.blocks import FfnShape
from flashmoe.nn.moe import DenseShape
from flashmoe.nn.rotary import Rope

Norms = Literal["none", "head", "flat"]  # of queries and keys: per head, or over all heads together


@dataclass(frozen=True, kw_only=True)
class GqaConfig(ModelConfig):
    """A model whose layers all have grouped-query attention.

    biased: those of the projections "q", "k", "v", "o" that have biases.  windows: of each layer, how many positions a
    token sees, itself included; 0 for all.  intermediate_size: of the layers without experts.
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope: Rope
    norms: Norms
    biased: str
    windows: tuple[int, ...]
    intermediate_size: int

    def attention(self, layer: int) -> AttentionShape:
        """The mixer of a layer."""
        return AttentionShape(
            self.hidden_size,
            self.num_attention_heads,
            self.num_key_value_heads,
            self.head_dim,
            self.rms_norm_eps,
            self.rope,
            gated=False,
            normed=self.norms != "none",
            flat_norms=self.norms == "flat",
            biased=self.biased,
            window=self.windows[layer],
        )


def gqa_values(
    fields: Fields,
    *,
    norms: Norms = "none",
    biased: str = "",
    windows: tuple[int, ...] | None = None,
    theta: float = 10_000.0,
    partial: float = 1.0,
) -> dict[str, Any]:
    """The values of GqaConfig apart from those of ModelConfig and intermediate_size.

    Key/value heads that are not stated are as many as heads; a head_dim that is not stated is hidden_size / heads.
    """
    heads = fields.integer("num_attention_heads")
    kv_heads = heads
    if fields.get("num_key_value_heads") is not None:
        kv_heads = fields.divisor_of("num_key_value_heads", heads, "num_attention_heads")
    if fields.get("head_dim") is not None:
        head_dim = fields.integer("head_dim", most=MAX_HEAD)
    else:
        head_dim = fields.integer("hidden_size") // heads
        if head_dim * heads != fields.integer("hidden_size") or head_dim > MAX_HEAD:
            fields.refuse("num_attention_heads", "must divide hidden_size where there is no head_dim")
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rope": rope_of(fields, rotated_part(fields, head_dim, partial), theta),
        "norms": norms,
        "biased": biased,
        "windows": windows or (0,) * fields.layer_count(),
    }


def dense_values(fields: Fields) -> dict[str, Any]:
    """The values of ModelConfig, and intermediate_size, of a model without experts."""
    return common_values(fields) | {
        "num_experts": 0,
        "num_experts_per_tok": 0,
        "moe_intermediate_size": 0,
        "dense_layers": frozenset(range(fields.layer_count())),
        "intermediate_size": fields.integer("intermediate_size"),
    }


def attention_biases(fields: Fields, biased: str = "qkvo") -> str:
    """`biased` where config.json says attention_bias, else none."""
    return biased if fields.boolean("attention_bias", default=False) else ""


def same_window(fields: Fields) -> tuple[int, ...]:
    """sliding_window in every layer, unless use_sliding_window is false."""
    on = fields.boolean("use_sliding_window", default=True) and fields.get("sliding_window") is not None
    return (fields.integer("sliding_window") if on else 0,) * fields.layer_count()


def upper_windows(fields: Fields) -> tuple[int, ...]:
    """sliding_window in the layers that layer_types lists, else from max_window_layers on, if use_sliding_window."""
    layers = fields.layer_count()
    if not fields.boolean("use_sliding_window", default=False) or fields.get("sliding_window") is None:
        return (0,) * layers
    window, kinds = fields.integer("sliding_window"), fields.get("layer_types")
    if kinds is None:
        first = fields.integer("max_window_layers", least=0)
        return tuple(window if i >= first else 0 for i in range(layers))
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in known for kind in kinds):
        fields.refuse("layer_types", f"must list {' or '.join(known)} for each of {layers} layers")
    return tuple(window if kind == known[1] else 0 for kind in kinds)


def plain_layers(fields: Fields) -> frozenset[int]:
    """The layers without experts by decoder_sparse_step and mlp_only_layers (Qwen)."""
    step = 1 if fields.get("decoder_sparse_step") is None else fields.integer("decoder_sparse_step")
    only = fields.layer_list("mlp_only_layers")
    return frozenset(i for i in range(fields.layer_count()) if i in only or (i + 1) % step)


def gqa_layers(config: GqaConfig, experts: FfnShape | None = None) -> list[Layer]:
    """Attention and, where a layer has them, `experts`."""
    dense = DenseShape(config.hidden_size, config.intermediate_size)
    ffns: list[FfnShape] = []
    for i in range(config.num_hidden_layers):
        assert experts is not None or i in config.dense_layers
        ffns.append(dense if experts is None or i in config.dense_layers else experts)
    return [Layer(config.attention(i), block) for i, block in enumerate(ffns)]


def gqa_spec(
    config: GqaConfig,
    mlp: Callable[[str], Iterator[Spec]] | None = None,
    experts: Callable[[int], ExpertsSpec] | None = None,
) -> ModelSpec:
    """All tensors: `mlp(prefix)` the resident ones of a layer with experts, `experts(layer)` those of its experts."""

    def layer(i: int) -> Iterator[Spec]:
        yield from _attention(config, f"layers.{i}.self_attn")
        prefix = f"layers.{i}.mlp"
        if mlp is None or i in config.dense_layers:
            yield ffn(f"{prefix}.dense", prefix, config.hidden_size, config.intermediate_size)
        else:
            yield from mlp(prefix)

    return assemble(config, layer, experts or (lambda i: routed_experts(config, i)))


def _attention(config: GqaConfig, prefix: str) -> Iterator[Spec]:
    shape, hidden = config.attention(0), config.hidden_size
    rows = {"q": shape.width, "k": shape.kv_width, "v": shape.kv_width, "o": hidden}
    for name, count in rows.items():
        module = f"{prefix}.{name}_proj"
        yield whole(module, count, shape.width if name == "o" else hidden)
        if name in config.biased:
            yield VectorSpec(f"{module}.bias", f"{module}.bias", (count,))
    if config.norms != "none":
        sizes = (shape.width, shape.kv_width) if config.norms == "flat" else (config.head_dim,) * 2
        yield norm(f"{prefix}.q_norm", sizes[0])
        yield norm(f"{prefix}.k_norm", sizes[1])
