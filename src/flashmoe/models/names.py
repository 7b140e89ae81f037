"""Parts of name maps that families share: which checkpoint tensor becomes which bundle tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from flashmoe.models.config import ModelConfig
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


def assemble(
    config: ModelConfig,
    layer: Callable[[int], Iterator[Spec]],
    experts: Callable[[int], ExpertsSpec],
    *,
    zero_centred: bool = False,
) -> ModelSpec:
    """A model of `layer(i)`'s resident tensors, its layers' norms, final norm, embedding, head and experts.

    zero_centred: a Hugging Face checkpoint stores its norms as w for a multiplier of 1 + w.
    """
    hidden, vocab = config.hidden_size, config.vocab_size
    resident: list[Spec] = [norm("norm", hidden, zero_centred)]
    for i in range(config.num_hidden_layers):
        resident += [
            norm(f"layers.{i}.{name}", hidden, zero_centred)
            for name in ("input_layernorm", "post_attention_layernorm")
        ]
        resident += layer(i)
    if not config.tie_word_embeddings:
        resident.append(whole("lm_head", vocab, hidden))
    resident.append(whole("embed_tokens", vocab, hidden))
    moe_layers = [i for i in range(config.num_hidden_layers) if i not in config.dense_layers]
    return ModelSpec(tuple(resident), tuple(experts(i) for i in moe_layers), config.tie_word_embeddings)


def norm(name: str, size: int, zero_centred: bool = False) -> VectorSpec:
    """The weights of a norm."""
    return VectorSpec(name, f"{name}.weight", (size,), zero_centred)


def whole(name: str, rows: int, cols: int) -> MatrixSpec:
    """A matrix that keeps its name."""
    return MatrixSpec(name, MatrixSource.whole(name, rows, cols))


def sensitive(name: str, rows: int, cols: int) -> MatrixSpec:
    """A matrix that keeps its name and eight bits."""
    return MatrixSpec(name, MatrixSource.whole(name, rows, cols), "sensitive")


def ffn(name: str, source: str, hidden: int, size: int) -> FfnSpec:
    """A feed-forward record from the three matrices below the module `source`."""
    return FfnSpec(name, hidden, size, ffn_source(source, hidden, size))


def ffn_source(
    source: str,
    hidden: int,
    size: int,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> FfnSource:
    """Gate, up and down matrix below the module `source`."""
    gate, up, down = names
    return FfnSource(
        MatrixSource.whole(f"{source}.{gate}", size, hidden),
        MatrixSource.whole(f"{source}.{up}", size, hidden),
        MatrixSource.whole(f"{source}.{down}", hidden, size),
    )


def routed_experts(
    config: ModelConfig,
    layer: int,
    mlp: str = "mlp",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    *,
    stacked: bool = False,
) -> ExpertsSpec:
    """The experts of a layer below its module `mlp`, in every form that checkpoints have.

    names: of gate, up and down in the form of one matrix an expert.  stacked: published are all experts in two tensors.
    """
    count, hidden, size = config.num_experts, config.hidden_size, config.moe_intermediate_size
    module = f"layers.{layer}.{mlp}"

    def fused(e: int) -> FfnSource:
        """gate_up_proj [E, 2I, H]: the first I rows of an expert are its gate."""
        name, rows = f"{module}.experts.gate_up_proj", count * 2 * size
        return FfnSource(
            MatrixSource(name, rows, hidden, ((2 * e * size, size),)),
            MatrixSource(name, rows, hidden, (((2 * e + 1) * size, size),)),
            MatrixSource(f"{module}.experts.down_proj", count * hidden, size, ((e * hidden, hidden),)),
        )

    def single(e: int) -> FfnSource:
        return ffn_source(f"{module}.experts.{e}", hidden, size, names)

    def switch(e: int) -> FfnSource:
        """MLX: three stacked matrices [E, rows, cols]."""
        name = f"{module}.switch_mlp"
        return FfnSource(
            MatrixSource(f"{name}.gate_proj", count * size, hidden, ((e * size, size),)),
            MatrixSource(f"{name}.up_proj", count * size, hidden, ((e * size, size),)),
            MatrixSource(f"{name}.down_proj", count * hidden, size, ((e * hidden, hidden),)),
        )

    published = fused if stacked else single
    return ExpertsSpec(layer, count, hidden, size, (fused, single, switch), published)
