"""Qwen3-Next (`qwen3_next`): Qwen3.5-MoE but for the linear-attention input projections.

They are stored as two matrices whose rows are grouped per key head; picking rows turns them into the four
flat matrices of qwen3_5_moe, so one forward pass serves both.
"""

from __future__ import annotations

from collections.abc import Iterator

from flashmoe.models.qwen3_5_config import Qwen35Config as Config
from flashmoe.models.qwen3_5_moe import layers
from flashmoe.models.qwen3_5_names import assemble_qwen
from flashmoe.models.spec import MatrixSource, MatrixSpec, ModelSpec, Role, Spec

__all__ = ["Config", "layers", "model_spec"]


def model_spec(config: Config) -> ModelSpec:
    """All tensors of a qwen3_next bundle."""
    return assemble_qwen(config, _linear_projections, stacked=False)


def _linear_projections(config: Config, prefix: str) -> Iterator[Spec]:
    heads, per_head = (
        config.linear_num_key_heads,
        config.linear_num_value_heads // config.linear_num_key_heads,
    )
    key, value = config.linear_key_head_dim, per_head * config.linear_value_head_dim
    qkvz = _Grouped(f"{prefix}.in_proj_qkvz", heads, (key, key, value, value), config.hidden_size)
    ba = _Grouped(f"{prefix}.in_proj_ba", heads, (per_head, per_head), config.hidden_size)
    yield qkvz.pick(f"{prefix}.in_proj_qkv", (0, 1, 2))
    yield qkvz.pick(f"{prefix}.in_proj_z", (3,))
    yield ba.pick(f"{prefix}.in_proj_b", (0,), "sensitive")
    yield ba.pick(f"{prefix}.in_proj_a", (1,), "sensitive")


class _Grouped:
    """A matrix whose rows are, for each of ``heads`` heads, ``parts`` blocks of the given row counts."""

    def __init__(self, module: str, heads: int, parts: tuple[int, ...], cols: int) -> None:
        self._module, self._heads, self._parts, self._cols = module, heads, parts, cols

    def pick(self, name: str, wanted: tuple[int, ...], role: Role = "plain") -> MatrixSpec:
        """The blocks ``wanted`` of all heads, one kind after another."""
        step = sum(self._parts)
        runs = tuple(
            (head * step + sum(self._parts[:part]), self._parts[part])
            for part in wanted
            for head in range(self._heads)
        )
        return MatrixSpec(name, MatrixSource(self._module, self._heads * step, self._cols, runs), role)
