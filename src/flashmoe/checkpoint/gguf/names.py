"""From GGUF's names and orders to those of Hugging Face checkpoints.

llama.cpp's converter turns query and key rows of Llama models so that rotated pairs are neighbours, and deals the
value heads of GatedDeltaNet out in turn; both are undone here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashmoe.checkpoint.dtypes import F32
from flashmoe.checkpoint.gguf.fused import GATE_UP, QKV
from flashmoe.checkpoint.reordered import Order

_TOP = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_k_b": "self_attn.k_b_proj",
    "attn_v_b": "self_attn.v_b_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.switch_mlp.gate_proj",
    "ffn_up_exps": "mlp.switch_mlp.up_proj",
    "ffn_down_exps": "mlp.switch_mlp.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "attn_qkv": QKV,
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_ba": "linear_attn.in_proj_ba",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
_RECURRENT_QKV = "linear_attn.in_proj_qkv"
# Where gate and up of all experts are one tensor, Hugging Face's names: those of its form with such a tensor.
_JOINED = {GATE_UP: "mlp.experts.gate_up_proj", "ffn_down_exps": "mlp.experts.down_proj"}
_WHOLE = {
    "ssm_a": "linear_attn.A_log",
    "ssm_dt.bias": "linear_attn.dt_bias",
    "attn_sinks.weight": "self_attn.sinks",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
}
_HYBRIDS = ("qwen3_5_moe_text", "qwen3_5_text")
# Beginnings that a family spells in its own way.
_SHARED = {"mlp.shared_expert.": "mlp.shared_experts."}
_OWN = {
    "mixtral": {"mlp.": "block_sparse_moe."},
    "gpt_oss": {"mlp.gate.": "mlp.router.", "mlp.switch_mlp.": "mlp.experts."},
    "glm4_moe": _SHARED,
    "deepseek_v3": _SHARED,
}
_EXPERT_NAMES = {"ffn_gate": "w1", "ffn_up": "w3", "ffn_down": "w2"}  # Mixtral's, in files of before 2024


@dataclass(frozen=True)
class Names:
    """``layers``: blocks from there on predict further tokens and are skipped.

    ``attention_interval``: of so many layers of a hybrid the last has attention.  ``joined``: numbers of the layers
    with gate and up of all experts in one tensor.
    """

    model_type: str
    layers: int
    attention_interval: int = 4
    joined: frozenset[str] = frozenset()

    def canonical(self, original: str) -> tuple[str, str | None]:
        """The name that models ask for, and the prefix under which the tensor is skipped, if it is."""
        stem, _, end = original.rpartition(".")
        if original.startswith("rope_"):  # what config_of() has turned into numbers
            return original, "rope_"
        if not original.startswith("blk."):
            return (f"{_TOP[stem]}.{end}", None) if stem in _TOP else (original, None)
        _, number, name = (*original.split(".", 2), "")[:3]
        if number.isdecimal() and int(number) >= self.layers:
            return original, f"blk.{int(number)}."
        return f"layers.{number}.{self._within(number, name)}", None

    def _within(self, number: str, name: str) -> str:
        """The name within its layer; what is not known keeps its own."""
        if name in _WHOLE:
            return _WHOLE[name]
        stem, _, end = name.rpartition(".")
        part, _, expert = stem.partition(".")
        if self.model_type == "mixtral" and part in _EXPERT_NAMES and expert:
            return f"block_sparse_moe.experts.{expert}.{_EXPERT_NAMES[part]}.{end}"
        module = self._module(number, stem)
        if module is None:
            return name
        known = f"{module}.{end}"
        for usual, own in _OWN.get(self.model_type, {}).items():
            if known.startswith(usual):
                return own + known[len(usual) :]
        return known

    def _module(self, number: str, stem: str) -> str | None:
        if stem in _JOINED and number in self.joined and self.model_type != "gpt_oss":  # whose own are turned
            return _JOINED[stem]
        module = _LAYER.get(stem)
        if module == QKV and self.model_type in _HYBRIDS and number.isdecimal():
            return module if (int(number) + 1) % self.attention_interval == 0 else _RECURRENT_QKV
        return module


class Orders:
    """Where rows, columns and values of the model's matrices and vectors stand in the file."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """``config`` is that of config_of(); sizes that make no sense give no order, and the model refuses them."""
        self._config = config
        self._turned = config.get("model_type") in ("llama", "mixtral")
        self._grouped = config.get("gguf_architecture") == "qwen3next"
        self._heads = _value_heads(config) if config.get("model_type") in _HYBRIDS else None

    def source(self, module: str) -> tuple[str, int]:
        """The module of the file that holds ``module``, and how many times its rows that one has."""
        head, _, name = module.rpartition(".")
        if self._grouped and name in ("in_proj_a", "in_proj_b"):
            return f"{head}.in_proj_ba", 2
        return module, 1

    def rows(self, module: str, rows: int) -> Order | None:
        """Row r of the model's matrix or vector is row [r] of the file's; None: they agree."""
        name = module.rpartition(".")[2]
        if self._turned and name in ("q_proj", "k_proj"):
            key = "num_attention_heads" if name == "q_proj" else "num_key_value_heads"
            return _turned(rows, self._number(key))
        if self._heads is None:
            return None
        if self._grouped:
            return self._heads.beside(name) if name in ("in_proj_a", "in_proj_b") else None
        return self._heads.tiled_rows(name, rows)

    def columns(self, module: str, cols: int) -> Order | None:
        """Column c of the model's matrix is column [c] of the file's; None: they agree."""
        if self._heads is None or self._grouped or not module.endswith("linear_attn.out_proj"):
            return None
        return self._heads.tiled(cols, 0)

    def vector(self, name: str, values: F32) -> F32:
        """The model's values of a vector of the file."""
        module = name.removesuffix(".weight").removesuffix(".bias")
        if module.endswith("linear_attn.A_log"):  # stored as -exp(A_log)
            with np.errstate(divide="ignore", invalid="ignore"):
                values = np.log(-values)
        width = self._number("linear_conv_kernel_dim") if module.endswith("linear_attn.conv1d") else 1
        grid = values.reshape(-1, width) if len(values) % width == 0 else values[:, None]
        order = self.rows(module, len(grid))
        return values if order is None else grid[order].reshape(-1)

    def _number(self, key: str) -> int:
        value = self._config.get(key)
        return value if type(value) is int and value > 0 else 1


def _turned(rows: int, heads: int) -> Order | None:
    """Pairs (j, j + half) of each head lie side by side in the file."""
    if rows % (2 * heads):
        return None
    size = rows // heads
    within = np.arange(size)
    stored = 2 * (within % (size // 2)) + within // (size // 2)
    order: Order = (np.arange(heads)[:, None] * size + stored).reshape(-1)
    return order


@dataclass(frozen=True)
class _ValueHeads:
    """GatedDeltaNet's value heads: ``per`` for each of ``keys`` key heads, side by side in the model."""

    keys: int
    per: int
    key_rows: int  # queries and keys, before the values

    def beside(self, name: str) -> Order:
        """Rows of in_proj_b or in_proj_a in a matrix that has b, then a, of each key head."""
        first = self.per if name == "in_proj_a" else 0
        order: Order = (np.arange(self.keys)[:, None] * 2 * self.per + first + np.arange(self.per)).reshape(
            -1
        )
        return order

    def tiled(self, length: int, before: int) -> Order | None:
        """Head k * per + j of the model is head j * keys + k of the file; ``before`` rows stand in front of them."""
        count = self.keys * self.per
        if self.per == 1 or length <= before or (length - before) % count:
            return None
        size = (length - before) // count
        grid: Order = np.arange(count * size).reshape(self.per, self.keys, size)
        return np.concatenate([np.arange(before), grid.transpose(1, 0, 2).reshape(-1) + before])

    def tiled_rows(self, name: str, rows: int) -> Order | None:
        """By the last part of a module's name."""
        if name in ("in_proj_qkv", "conv1d"):
            return self.tiled(rows, self.key_rows)
        heads = ("in_proj_z", "in_proj_a", "in_proj_b", "A_log", "dt_bias")
        return self.tiled(rows, 0) if name in heads else None


def _value_heads(config: Mapping[str, Any]) -> _ValueHeads | None:
    keys, values, dim = (
        config.get(f"linear_{name}") for name in ("num_key_heads", "num_value_heads", "key_head_dim")
    )
    for number in (keys, values, dim):
        if type(number) is not int or not 0 < number <= 1 << 20:
            return None
    assert isinstance(keys, int)
    assert isinstance(values, int)
    assert isinstance(dim, int)
    return _ValueHeads(keys, values // keys, 2 * keys * dim) if values % keys == 0 else None
