"""config.json from GGUF metadata, for each architecture that flashmoe computes."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flashmoe.errors import CheckpointError

Table = dict[str, Any]


class Metadata:
    """Look-ups below an architecture's prefix.  Values of the wrong type stay: the model's own checks name them."""

    def __init__(self, path: Path, values: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> None:
        """``tensors``: name -> shape, of all files of the model."""
        self.path, self.tensors, self._values = path, tensors, values
        self.architecture = values.get("general.architecture")

    def get(self, key: str, default: Any = None) -> Any:
        """The value under the architecture's prefix, a whole list of one number as that number."""
        return _plain(self._values.get(f"{self.architecture}.{key}", default))

    def plain(self, key: str) -> Any:
        """The value of a whole key."""
        return _plain(self._values.get(key))

    def count(self, key: str) -> int:
        """A number that decides about names of tensors; raises CheckpointError when it is none."""
        value = self.get(key)
        if type(value) is not int or not 0 < value <= 1 << 20:
            raise CheckpointError(
                f"{self.path}: {self.architecture}.{key} is {reprlib.repr(value)}, no sensible number:"
                " download it again"
            )
        return value

    @property
    def layers(self) -> int:
        """Decoder layers, without those that predict further tokens."""
        extra = self.get("nextn_predict_layers", 0)
        return self.count("block_count") - (extra if type(extra) is int and extra > 0 else 0)

    def has_tensor(self, end: str) -> bool:
        """Whether the first layer, or the model, has a tensor of that name."""
        return f"blk.0.{end}" in self.tensors or end in self.tensors


def _plain(value: Any) -> Any:
    """Values as JSON has them: float32 in their shortest spelling, lists of one number as the number."""
    if isinstance(value, np.ndarray):
        items = value.tolist()
        return items[0] if items and all(item == items[0] for item in items) else items
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _common(meta: Metadata) -> Table:
    heads = meta.get("attention.head_count")
    hidden = meta.get("embedding_length")
    head_dim = meta.get("attention.key_length")
    if head_dim is None and type(hidden) is int and type(heads) is int and heads:
        head_dim = hidden // heads
    vocabulary = meta.tensors.get("token_embd.weight", (0,))[0]
    table = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": meta.get("feed_forward_length"),
        "num_hidden_layers": meta.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": meta.get("attention.layer_norm_rms_epsilon"),
        "rope_theta": meta.get("rope.freq_base", 10000.0),
        "max_position_embeddings": meta.get("context_length"),
        "tie_word_embeddings": "output.weight" not in meta.tensors,
        "attention_bias": meta.has_tensor("attn_q.bias"),
    }
    return table | _token_ids(meta) | _rope_scaling(meta)


def _token_ids(meta: Metadata) -> Table:
    ids = {}
    for name in ("bos", "eos"):
        token = meta.plain(f"tokenizer.ggml.{name}_token_id")
        if token is not None:
            ids[f"{name}_token_id"] = token
    return ids


def _rope_scaling(meta: Metadata) -> Table:
    kind = meta.get("rope.scaling.type", "none")
    if "rope_freqs.weight" in meta.tensors:
        raise CheckpointError(
            f"{meta.path} scales its rotations by a table (rope_freqs.weight, Llama 3.1 and later), which flashmoe"
            " does not read: convert the safetensors variant"
        )
    if kind == "none":
        return {}
    scaling = {"rope_type": kind, "factor": meta.get("rope.scaling.factor")}
    original = meta.get("rope.scaling.original_context_length")
    if original is not None:
        scaling["original_max_position_embeddings"] = original
    for key, name in (
        ("yarn_log_multiplier", "mscale_all_dim"),
        ("yarn_beta_fast", "beta_fast"),
        ("yarn_beta_slow", "beta_slow"),
    ):
        if meta.get(f"rope.scaling.{key}") is not None:
            scaling[name] = meta.get(f"rope.scaling.{key}")
    return {"rope_scaling": scaling}


def _llama(meta: Metadata) -> Table:
    if meta.get("expert_count", 0):
        experts = {"num_local_experts": meta.get("expert_count"), **_experts_used(meta)}
        return {"model_type": "mixtral", **_common(meta), **experts}
    return {"model_type": "llama", **_common(meta)}


def _experts_used(meta: Metadata) -> Table:
    return {"num_experts_per_tok": meta.get("expert_used_count")}


def _moe(meta: Metadata) -> Table:
    return {
        "num_experts": meta.get("expert_count"),
        "moe_intermediate_size": meta.get("expert_feed_forward_length"),
        **_experts_used(meta),
    }


def _qwen3moe(meta: Metadata) -> Table:
    switches = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    return {"model_type": "qwen3_moe", **_common(meta), **_moe(meta), **switches}


def _olmoe(meta: Metadata) -> Table:
    table = {"model_type": "olmoe", **_common(meta), "norm_topk_prob": False}
    return table | {"num_experts": meta.get("expert_count"), **_experts_used(meta)}


def _glm4moe(meta: Metadata) -> Table:
    return {
        "model_type": "glm4_moe",
        **_common(meta),
        "n_routed_experts": meta.get("expert_count"),
        "n_shared_experts": meta.get("expert_shared_count"),
        "moe_intermediate_size": meta.get("expert_feed_forward_length"),
        "first_k_dense_replace": meta.get("leading_dense_block_count", 0),
        "norm_topk_prob": meta.get("expert_weights_norm", True),
        "routed_scaling_factor": meta.get("expert_weights_scale", 1.0),
        "n_group": meta.get("expert_group_count", 1),
        "topk_group": meta.get("expert_group_used_count", 1),
        "use_qk_norm": meta.has_tensor("attn_q_norm.weight"),
        "partial_rotary_factor": _rotary_factor(meta, 0.5),
        **_experts_used(meta),
    }


def _qwen35(meta: Metadata) -> Table:
    """Qwen3.5 and Qwen3-Next, whose grouped projections a GGUF file has taken apart."""
    key, heads, inner = (meta.get(f"ssm.{name}") for name in ("state_size", "time_step_rank", "inner_size"))
    value = inner // heads if type(inner) is int and type(heads) is int and heads else None
    common = _common(meta)
    rope = {"rope_type": "default", "rope_theta": common.pop("rope_theta")}
    return {
        "model_type": "qwen3_5_moe_text",
        **common,
        **_moe(meta),
        "shared_expert_intermediate_size": meta.get("expert_shared_feed_forward_length"),
        "linear_num_key_heads": meta.get("ssm.group_count"),
        "linear_num_value_heads": heads,
        "linear_key_head_dim": key,
        "linear_value_head_dim": value,
        "linear_conv_kernel_dim": meta.get("ssm.conv_kernel"),
        "full_attention_interval": meta.get("full_attention_interval", 4),
        "rope_parameters": rope | {"partial_rotary_factor": _rotary_factor(meta, 0.25)},
    }


def _rotary_factor(meta: Metadata, default: float) -> float:
    turned, size = meta.get("rope.dimension_count"), _common_head(meta)
    return turned / size if type(turned) is int and type(size) is int and size else default


def _common_head(meta: Metadata) -> Any:
    return meta.get("attention.key_length")


def _dense(model_type: str) -> Callable[[Metadata], Table]:
    return lambda meta: {"model_type": model_type, **_common(meta)}


_ARCHITECTURES: dict[str, Callable[[Metadata], Table]] = {
    "llama": _llama,
    "qwen2": _dense("qwen2"),
    "qwen3": _dense("qwen3"),
    "qwen3moe": _qwen3moe,
    "olmoe": _olmoe,
    "glm4moe": _glm4moe,
    "qwen3next": _qwen35,
    "qwen35moe": _qwen35,
}


def config_of(meta: Metadata) -> Table:
    """The config.json of the model; raises CheckpointError for an architecture that flashmoe does not read."""
    make = _ARCHITECTURES.get(meta.architecture) if isinstance(meta.architecture, str) else None
    if make is None:
        known = ", ".join(sorted(_ARCHITECTURES))
        raise CheckpointError(
            f"{meta.path}: the architecture {reprlib.repr(meta.architecture)} is not read from GGUF: use a model of"
            f" {known}, or its safetensors variant"
        )
    table = {key: value for key, value in make(meta).items() if value is not None}
    return table | {"gguf_architecture": meta.architecture}
