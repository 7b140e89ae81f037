"""Tiny Hugging Face checkpoints of every family turned into GGUF files as llama.cpp's converter does it.

Names are the gguf package's own; what moves in a matrix is spelled out again from the converter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Tensors = dict[str, Array]
Config = Mapping[str, Any]
_TYPES = {"F32": "<f4", "F16": "<f2", "U8": "u1"}
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")


def read(folder: Path) -> Tensors:
    """Every tensor of a checkpoint by its name: float32, or bytes."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + size]).items():
            if name != "__metadata__":
                begin, end = (8 + size + at for at in entry["data_offsets"])
                found[name] = _values(data[begin:end], entry["dtype"]).reshape(entry["shape"])
    return found


def _values(raw: bytes, dtype: str) -> Array:
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, _TYPES[dtype]).astype(np.uint8 if dtype == "U8" else np.float32)


def some_layers(tensors: Tensors, layers: list[int]) -> Tensors:
    """What belongs to no layer or to one of ``layers``, which are numbered anew."""
    kept = {}
    for name, values in tensors.items():
        parts = name.split(".")
        if parts[1] == "layers":
            if int(parts[2]) not in layers:
                continue
            parts[2] = str(layers.index(int(parts[2])))
        kept[".".join(parts)] = values
    return kept


def numbers(config: Config) -> dict[str, Any]:
    """What the converter writes for any model."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = config.get("rope_theta") or rope["rope_theta"]
    out = {
        "block_count": config["num_hidden_layers"], "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"], "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"], "rope.freq_base": float(theta),
    }  # fmt: skip
    if config.get("head_dim"):
        out |= {"attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"]}
    experts = next(
        (config[k] for k in ("num_local_experts", "num_experts", "n_routed_experts") if k in config), 0
    )
    if experts:
        out |= {"expert_count": experts, "expert_used_count": config["num_experts_per_tok"]}
    if config.get("n_group"):
        out |= {"expert_group_count": config["n_group"], "expert_group_used_count": config["topk_group"]}
    if rope.get("rope_type") == "yarn":
        out |= {
            "rope.scaling.type": "yarn", "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
            "rope.scaling.yarn_beta_fast": float(rope["beta_fast"]),
            "rope.scaling.yarn_beta_slow": float(rope["beta_slow"]),
        }  # fmt: skip
    return out


def merged(config: Config, tensors: Tensors, forms: Any) -> Iterator[tuple[str, Array]]:
    """Experts stacked: [experts, rows, columns] of each matrix."""
    stacks: dict[str, list[Array]] = {}
    for name, values in sorted(tensors.items(), key=lambda item: _expert_number(item[0])):
        found = _EXPERT.fullmatch(name)
        if found:
            stacks.setdefault(f"{found[1]}.{found[3]}.weight", []).append(values)
        else:
            yield name, values
    for name, parts in stacks.items():
        yield name, np.stack(parts)


def _expert_number(name: str) -> int:
    found = _EXPERT.fullmatch(name)
    return int(found[2]) if found else -1


def llama(config: Config, tensors: Tensors, forms: Any) -> Iterator[tuple[str, Array]]:
    """Pairs of queries and keys that turn together lie side by side."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, values in merged(config, tensors, forms):
        part = name.split(".")[-2]
        yield name, forms.turned(values, heads[part]) if part in heads else values


def gpt_oss(config: Config, tensors: Tensors, forms: Any) -> Iterator[tuple[str, Array]]:
    """Gate and up apart, rows as they are multiplied; MXFP4 blocks as ggml has them."""
    for name, values in tensors.items():
        if name.endswith("sinks"):
            yield f"{name}.weight", values
        elif name.endswith("_blocks"):
            scales = tensors[name.replace("_blocks", "_scales")]
            yield from _apart(name.removesuffix("_blocks"), ".weight", _mxfp4(values, scales), 1)
        elif name.endswith("_proj_bias"):
            yield from _apart(name.removesuffix("_bias"), ".bias", values, 1)
        elif name.endswith(("gate_up_proj", "experts.down_proj")):
            yield from _apart(name, ".weight", values.swapaxes(1, 2), 1)
        elif not name.endswith("_scales"):
            yield name, values


def _apart(name: str, end: str, values: Array, axis: int) -> Iterator[tuple[str, Array]]:
    if not name.endswith("gate_up_proj"):
        yield name + end, values
        return
    for first, part in enumerate(("gate_proj", "up_proj")):
        places = np.arange(first, values.shape[axis], 2)
        yield name.replace("gate_up_proj", part) + end, np.take(values, places, axis)


def _mxfp4(blocks: Array, scales: Array) -> Array:
    """Bytes [experts, rows, 17 for 32 values]: the power, then values 0-15 in the low halves and 16-31 in the high."""
    codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(*scales.shape, 32)
    packed = codes[..., :16] | codes[..., 16:] << 4
    joined = np.concatenate([scales[..., None], packed], -1)
    return joined.reshape(*scales.shape[:2], -1).astype(np.uint8)


def deepseek(config: Config, tensors: Tensors, forms: Any) -> Iterator[tuple[str, Array]]:
    """Keys' and values' projections apart, the keys' turned."""
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    for name, values in merged(config, tensors, forms):
        if not name.endswith("kv_b_proj.weight"):
            yield name, values
            continue
        heads = values.reshape(config["num_attention_heads"], nope + value, -1)
        yield name.replace("kv_b", "k_b"), heads[:, :nope].swapaxes(1, 2)
        yield name.replace("kv_b", "v_b"), heads[:, nope:]


def recurrent(name: str, values: Array) -> tuple[str, Array]:
    """As the converter has them in models with recurrent layers: norms with 1 added, -exp(A_log)."""
    if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        values = values + np.float32(1)
    elif name.endswith("A_log"):
        values = -np.exp(values)
    return name.replace("dt_bias", "dt_proj.bias"), values


def hybrid(config: Config, tensors: Tensors, forms: Any) -> Iterator[tuple[str, Array]]:
    """Value heads dealt out."""
    keys, per = (
        config["linear_num_key_heads"],
        config["linear_num_value_heads"] // config["linear_num_key_heads"],
    )
    before = 2 * keys * config["linear_key_head_dim"]
    for original, values in merged(config, tensors, forms):
        part = original.removesuffix(".weight").rpartition("linear_attn.")[2]
        name, values = recurrent(original, values)
        if part in ("in_proj_qkv", "conv1d"):
            values = forms.tiled(values.reshape(len(values), -1), 0, keys, per, before)
        elif part in ("in_proj_z", "in_proj_a", "in_proj_b", "A_log", "dt_bias"):
            values = forms.tiled(values, 0, keys, per)
        elif part == "out_proj":
            values = forms.tiled(values, 1, keys, per)
        yield name, values


def grouped(config: Config, tensors: Tensors, forms: Any) -> Iterator[tuple[str, Array]]:
    """Qwen3-Next: a key head's queries, keys, values and gates lie side by side and are taken apart; gates of the state
    (in_proj_ba) stay as they are."""
    keys, size = config["linear_num_key_heads"], config["linear_key_head_dim"]
    wide = config["linear_num_value_heads"] // keys * config["linear_value_head_dim"]
    for name, values in merged(config, tensors, forms):
        if "in_proj_qkvz" in name:
            heads = values.reshape(keys, 2 * (size + wide), -1)
            *qkv, z = (
                part.reshape(-1, values.shape[1])
                for part in np.split(heads, [size, 2 * size, 2 * size + wide], axis=1)
            )
            yield name.replace("qkvz", "qkv"), np.concatenate(qkv)
            yield name.replace("qkvz", "z"), z
        else:
            yield recurrent(name, values[:, 0] if "conv1d" in name else values)


Moves = Callable[[Config, Tensors, Any], Iterator[tuple[str, Array]]]
MOVES: dict[str, Moves] = {
    "llama": llama, "gpt-oss": gpt_oss, "deepseek2": deepseek, "qwen35": hybrid,
    "qwen3next": grouped,
}  # fmt: skip


def expert_rows(config: Config) -> dict[str, Any]:
    """What the converter adds for this family."""
    return {"expert_feed_forward_length": config["moe_intermediate_size"]}


def glm_numbers(config: Config) -> dict[str, Any]:
    """Half of a head turned, dense first layers, sigmoid routing."""
    return expert_rows(config) | {
        "rope.dimension_count": config["head_dim"] // 2, "leading_dense_block_count": config["first_k_dense_replace"],
        "expert_shared_count": config["n_shared_experts"], "expert_weights_norm": True, "expert_gating_func": 2,
        "expert_weights_scale": config["routed_scaling_factor"], "nextn_predict_layers": 0,
    }  # fmt: skip


def gpt_oss_numbers(config: Config) -> dict[str, Any]:
    """The window of every other layer."""
    rows = config["intermediate_size"]
    return {"attention.sliding_window": config["sliding_window"], "expert_feed_forward_length": rows}


def deepseek_numbers(config: Config) -> dict[str, Any]:
    """The absorbed form: one head of keys for all, of the latent's size."""
    latent, rotated = config["kv_lora_rank"], config["qk_rope_head_dim"]
    return expert_rows(config) | {
        "attention.head_count_kv": 1, "attention.q_lora_rank": config["q_lora_rank"], "attention.kv_lora_rank": latent,
        "attention.key_length": latent + rotated, "attention.value_length": latent,
        "attention.key_length_mla": config["qk_nope_head_dim"] + rotated,
        "attention.value_length_mla": config["v_head_dim"], "rope.dimension_count": rotated,
        "leading_dense_block_count": config["first_k_dense_replace"], "expert_weights_norm": True,
        "expert_shared_count": config["n_shared_experts"], "expert_gating_func": 2,
        "expert_weights_scale": config["routed_scaling_factor"],
        "rope.scaling.yarn_log_multiplier": 0.1 * config["rope_parameters"]["mscale_all_dim"],
    }  # fmt: skip


def hybrid_numbers(config: Config) -> dict[str, Any]:
    """The recurrent layers."""
    heads = config["linear_num_value_heads"]
    return {
        "rope.dimension_count": config["head_dim"] // 4, "ssm.conv_kernel": config["linear_conv_kernel_dim"],
        "ssm.state_size": config["linear_key_head_dim"], "ssm.group_count": config["linear_num_key_heads"],
        "ssm.time_step_rank": heads, "ssm.inner_size": heads * config["linear_value_head_dim"],
        "full_attention_interval": 2,
    }  # fmt: skip


def sparse_hybrid_numbers(config: Config) -> dict[str, Any]:
    """The recurrent layers and experts beside a shared one."""
    shared = {"expert_shared_feed_forward_length": config["shared_expert_intermediate_size"]}
    return hybrid_numbers(config) | expert_rows(config) | shared


NUMBERS: dict[str, Callable[[Config], dict[str, Any]]] = {
    "qwen3moe": expert_rows, "glm4moe": glm_numbers, "gpt-oss": gpt_oss_numbers, "deepseek2": deepseek_numbers,
    "qwen35": hybrid_numbers, "qwen3next": sparse_hybrid_numbers,
}  # fmt: skip


def write(
    path: Path,
    architecture: str,
    config: Config,
    tensors: Tensors,
    forms: Any,
    *,
    block: str = "BF16",
    fused: bool = False,
) -> Path:
    """Matrices in ``block`` where rows are whole blocks, vectors and routers in float32, as the converter has them.

    fused: as gguf_forms.joined(), but for the experts of gpt-oss, which llama.cpp has no such form of.
    """
    kind = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    out = {}
    for name, values in MOVES.get(architecture, merged)(config, tensors, forms):
        spelled = name.replace("e_score_correction_bias", "e_score_correction.bias")
        known = names.get_name(spelled, try_suffixes=(".weight", ".bias"))
        assert known is not None, name
        small = values.ndim == 1 or "ffn_gate_inp" in known or "conv1d" in known or known.endswith("bias")
        usual = block if values.shape[-1] % 32 == 0 else "BF16"
        out[known] = values, "MXFP4" if values.dtype == np.uint8 else "F32" if small else usual
    extra = NUMBERS[architecture](config) if architecture in NUMBERS else {}
    if fused:
        out = forms.joined(out, experts=architecture != "gpt-oss")
    written: Path = forms.write(path, architecture, numbers(config) | extra, out)
    return written
