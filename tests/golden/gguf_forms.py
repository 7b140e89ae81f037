"""Tiny models written as GGUF files by the gguf package, in the order and under the names that llama.cpp uses.

The reordering is spelled out again from llama.cpp's converter; nothing is shared with the reader.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import quants
from numpy.typing import NDArray

Array = NDArray[Any]
KINDS = gguf.GGMLQuantizationType


def write(
    path: Path,
    architecture: str,
    numbers: Mapping[str, Any],
    tensors: Mapping[str, tuple[Array, str]],
    tokenizer: Callable[[gguf.GGUFWriter], None] | None = None,
) -> Path:
    """``numbers``: metadata below the architecture; ``tensors``: name -> (values, or bytes of blocks, type)."""
    writer = gguf.GGUFWriter(path, architecture)
    add = {float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool, str: writer.add_string}
    for key, value in numbers.items():
        add[type(value)](f"{architecture}.{key}", value)
    (tokenizer or add_bytes_tokenizer)(writer)
    for name, (values, kind) in tensors.items():
        if values.dtype == np.uint8:
            writer.add_tensor(name, values, raw_dtype=KINDS[kind])
        elif kind == "F32":
            writer.add_tensor(name, np.ascontiguousarray(values, np.float32))
        else:
            writer.add_tensor(
                name, quants.quantize(values.astype(np.float32), KINDS[kind]), raw_dtype=KINDS[kind]
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_bytes_tokenizer(writer: gguf.GGUFWriter) -> None:
    """A vocabulary of a few letters and an end."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    tokens = [*"abcdefgh", "Ġ", "ab", "Ġab", "<|end|>"]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(["a b", "Ġ ab"])
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")


def joined(tensors: Mapping[str, tuple[Array, str]], experts: bool = True) -> dict[str, tuple[Array, str]]:
    """As --fuse-qkv has it, rows one below the other, and with ``experts`` --fuse-gate-up-exps, within each expert."""
    out = dict(tensors)
    for name in tensors:
        block, _, part = name.rpartition(".attn_q.")
        if block and name in out:
            names = [f"{block}.attn_{letter}.{part}" for letter in "qkv"]
            out[f"{block}.attn_qkv.{part}"] = _one(out, names, 0)
        block, _, part = name.rpartition(".ffn_gate_exps.")
        if block and experts:
            names = [f"{block}.ffn_{which}_exps.{part}" for which in ("gate", "up")]
            out[f"{block}.ffn_gate_up_exps.{part}"] = _one(out, names, 1)
    return out


def _one(tensors: dict[str, tuple[Array, str]], names: list[str], axis: int) -> tuple[Array, str]:
    taken = [tensors.pop(name) for name in names]
    (kind,) = {kind for _, kind in taken}
    return np.concatenate([values for values, _ in taken], axis), kind


def stored(values: Array, kind: str) -> Array:
    """What comes back of values that are stored as ``kind``."""
    if kind == "F32":
        return values.astype(np.float32)
    blocks = quants.quantize(values.astype(np.float32), KINDS[kind])
    return quants.dequantize(blocks, KINDS[kind]).reshape(values.shape)


def tiled(values: Array, axis: int, keys: int, values_per_key: int, before: int = 0) -> Array:
    """Value heads dealt out: first one of each key head, then the next of each."""
    moved = np.moveaxis(values, axis, 0)
    head, rest = moved[:before], moved[before:]
    grid = rest.reshape(keys, values_per_key, -1, *rest.shape[1:])
    out = np.concatenate([head, np.swapaxes(grid, 0, 1).reshape(rest.shape)])
    return np.moveaxis(out, 0, axis)


def turned(values: Array, heads: int) -> Array:
    """LlamaModel.permute."""
    return (
        values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        .swapaxes(1, 2)
        .reshape(values.shape)
    )


LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate", "linear_attn.in_proj_a": "ssm_alpha", "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.out_proj": "ssm_out", "linear_attn.conv1d": "ssm_conv1d", "linear_attn.norm": "ssm_norm",
    "mlp.gate": "ffn_gate_inp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp", "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp", "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps", "mlp.experts.down_proj": "ffn_down_exps",
}  # fmt: skip
TOP = {"embed_tokens": "token_embd", "lm_head": "output", "norm": "output_norm"}


def original_name(name: str) -> str:
    """GGUF's name of a canonical module, without its ending."""
    if name in TOP:
        return TOP[name]
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{LAYER[rest]}"


def qwen35moe_numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a Qwen3.5 model."""
    heads = config["linear_num_value_heads"]
    return {
        "block_count": config["num_hidden_layers"], "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"], "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"], "attention.key_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"], "rope.freq_base": 10000.0,
        "rope.dimension_count": config["head_dim"] // 4, "expert_count": config["num_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_feed_forward_length": config["shared_expert_intermediate_size"],
        "ssm.conv_kernel": config["linear_conv_kernel_dim"], "ssm.state_size": config["linear_key_head_dim"],
        "ssm.group_count": config["linear_num_key_heads"], "ssm.time_step_rank": heads,
        "ssm.inner_size": heads * config["linear_value_head_dim"],
        "full_attention_interval": 2,
    }  # fmt: skip


def qwen35moe(
    path: Path,
    config: Mapping[str, Any],
    vectors: Mapping[str, Array],
    matrices: Mapping[str, Array],
    kind: str,
    *,
    fused: bool = False,
) -> dict[str, Array]:
    """Write a Qwen3.5 model; returns what each matrix must come back as, in the model's own order.

    fused: as joined() has it.
    """
    keys, heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    before = 2 * keys * config["linear_key_head_dim"]

    def order(name: str, values: Array) -> Array:
        part = name.rpartition("linear_attn.")[2]
        if part in ("in_proj_qkv", "conv1d"):
            return tiled(values, 0, keys, heads // keys, before)
        if part in ("in_proj_z", "in_proj_a", "in_proj_b", "A_log", "dt_bias"):
            return tiled(values, 0, keys, heads // keys)
        return tiled(values, 1, keys, heads // keys) if part == "out_proj" else values

    tensors: dict[str, tuple[Array, str]] = {}
    truth = {}
    for name, values in vectors.items():
        if name.endswith("A_log"):
            tensors[f"{name.replace('layers', 'blk').replace('linear_attn.A_log', 'ssm_a')}"] = (
                order(name, -np.exp(values)),
                "F32",
            )
        elif name.endswith("dt_bias"):
            tensors[name.replace("layers", "blk").replace("linear_attn.dt_bias", "ssm_dt.bias")] = (
                order(name, values),
                "F32",
            )
        else:
            centred = name.endswith("norm") and not name.endswith("linear_attn.norm")
            shaped = values[:, 0] if name.endswith("conv1d") else values + np.float32(centred)
            tensors[f"{original_name(name)}.weight"] = (order(name, shaped), "F32")
    for name, values in matrices.items():
        sensitive = name.endswith((".gate", "shared_expert_gate", "in_proj_a", "in_proj_b"))
        used = "F32" if sensitive else kind
        shaped = values[0] if name.endswith("shared_expert_gate") else order(name, values)
        tensors[f"{original_name(name)}.weight"] = (shaped, used)
        truth[name] = untiled(stored(order(name, values), used), name, order)
    write(path, "qwen35moe", qwen35moe_numbers(config), joined(tensors) if fused else tensors)
    return truth


def untiled(values: Array, name: str, order: Callable[[str, Array], Array]) -> Array:
    """The inverse of ``order``, by following where each element goes."""
    places = order(name, np.arange(values.size).reshape(values.shape)).reshape(-1)
    out = np.empty(values.size, values.dtype)
    out[places] = values.reshape(-1)
    return out.reshape(values.shape)
