"""config.json from GGUF metadata, for each architecture that flashmoe computes."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flashmoe.checkpoint.tensors import TensorRef
from flashmoe.errors import CheckpointError

Table = dict[str, Any]
_SIGMOID = 2  # expert_gating_func


class Metadata:
    """Look-ups below an architecture's prefix.  Values of the wrong type stay: the model's own checks name them."""

    def __init__(self, path: Path, values: Mapping[str, Any], tensors: Mapping[str, TensorRef]) -> None:
        """``tensors``: those of all files of the model by their names there."""
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
    embedding = meta.tensors.get("token_embd.weight")
    table = {
        "vocab_size": embedding.entry.shape[0] if embedding is not None and embedding.entry.shape else None,
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
        "attention_bias": meta.has_tensor("attn_q.bias") or meta.has_tensor("attn_qkv.bias"),
    }
    return table | _token_ids(meta) | _rope_scaling(meta, head_dim)


def _token_ids(meta: Metadata) -> Table:
    ids = {}
    for name in ("bos", "eos"):
        token = meta.plain(f"tokenizer.ggml.{name}_token_id")
        if token is not None:
            ids[f"{name}_token_id"] = token
    return ids


def _rope_scaling(meta: Metadata, head_dim: Any) -> Table:
    table = meta.tensors.get("rope_freqs.weight")
    if table is not None:
        return {"rope_scaling": _llama3_scaling(meta, table, head_dim)}
    kind = meta.get("rope.scaling.type", "none")
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
        ("yarn_attn_factor", "attention_factor"),
    ):
        if meta.get(f"rope.scaling.{key}") is not None:
            scaling[name] = meta.get(f"rope.scaling.{key}")
    if "mscale_all_dim" in scaling:  # llama.cpp has no key for the other one, and computes with 1
        scaling["mscale"] = 1.0
    return {"rope_scaling": scaling}


def _llama3_scaling(meta: Metadata, table: TensorRef, head_dim: Any) -> Table:
    """The four numbers behind the table of divisors that llama.cpp stores for Llama 3.1 and later.

    All published models share the last three; other tables are refused, for they cannot be told apart from rounding.
    """
    low, high, original = 1.0, 4.0, 8192
    theta = meta.get("rope.freq_base", 10000.0)
    pairs = table.entry.shape[-1] if table.entry.shape else 0
    if (
        table.entry.dtype == "F32"
        and type(head_dim) is int
        and 2 * pairs == head_dim
        and isinstance(theta, float)
    ):
        found = table.floats([(0, 1)])[0].astype(np.float64)
        factor = float(found.max())
        turns = original * theta ** (-np.arange(pairs) / pairs) / (2 * math.pi)
        mix = np.clip((turns - low) / (high - low), 0, 1)
        if factor > 0 and np.allclose(found, 1 / ((1 - mix) / factor + mix), rtol=1e-3):
            kind = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
            return kind | {"original_max_position_embeddings": original}
    raise CheckpointError(
        f"{table.where} is no table of Llama 3.1 or 3.2: convert the model's safetensors variant"
    )


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


def _grouped(meta: Metadata, groups: tuple[int, int], renormalised: bool) -> Table:
    """Sigmoid routing in groups; ``groups``, and how many are taken, and ``renormalised`` where the file is silent."""
    return {
        "n_routed_experts": meta.get("expert_count"),
        "n_shared_experts": meta.get("expert_shared_count"),
        "moe_intermediate_size": meta.get("expert_feed_forward_length"),
        "first_k_dense_replace": meta.get("leading_dense_block_count", 0),
        "norm_topk_prob": meta.get("expert_weights_norm", renormalised),
        "routed_scaling_factor": meta.get("expert_weights_scale", 1.0),
        "n_group": meta.get("expert_group_count", groups[0]),
        "topk_group": meta.get("expert_group_used_count", groups[1]),
        **_experts_used(meta),
    }


def _glm4moe(meta: Metadata) -> Table:
    return {
        "model_type": "glm4_moe",
        **_common(meta),
        **_grouped(meta, (1, 1), renormalised=True),
        "use_qk_norm": meta.has_tensor("attn_q_norm.weight"),
        "partial_rotary_factor": _rotary_factor(meta, 0.5),
    }


def _gpt_oss(meta: Metadata) -> Table:
    table = {
        "model_type": "gpt_oss",
        **_common(meta),
        "intermediate_size": meta.get("expert_feed_forward_length"),
        "num_local_experts": meta.get("expert_count"),
        "sliding_window": meta.get("attention.sliding_window"),
        **_experts_used(meta),
    }
    if "rope_scaling" in table:  # the files do not say it, the published models all do
        table["rope_scaling"]["truncate"] = False
    return table


def _deepseek2(meta: Metadata) -> Table:
    """Files with the keys' and values' projections apart describe the absorbed form: their head sizes end in _mla."""
    rotated = meta.get("rope.dimension_count")
    whole = meta.get("attention.key_length_mla", meta.get("attention.key_length"))
    common = _common(meta)
    common.pop("head_dim")
    return {
        "model_type": "deepseek_v3",
        **common,
        "num_key_value_heads": meta.get("attention.head_count"),
        "q_lora_rank": meta.get("attention.q_lora_rank"),
        "kv_lora_rank": meta.get("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": whole - rotated if type(whole) is type(rotated) is int else None,
        "v_head_dim": meta.get("attention.value_length_mla", meta.get("attention.value_length")),
        "rope_interleave": True,
        **_grouped(meta, _deepseek_groups(meta), renormalised=False),
        # Version 2, whose files do not name it, has softmax.
        "scoring_func": "sigmoid" if meta.get("expert_gating_func") == _SIGMOID else "softmax",
        **_latent_scaling(common),
    }


def _deepseek_groups(meta: Metadata) -> tuple[int, int]:
    """Groups of experts and how many are taken where the file does not say: early ones of DeepSeek-V3 do not."""
    sizes = meta.layers, meta.get("expert_count"), meta.get("embedding_length")
    return (8, 4) if sizes == (61, 256, 7168) else (1, 1)


def _latent_scaling(common: Table) -> Table:
    """YaRN whose two factors of the amplitude cancel; the converter writes a tenth of what scales the scores."""
    scaling = common.get("rope_scaling", {})
    tenth = scaling.get("mscale_all_dim")
    if not isinstance(tenth, float):
        return {}
    scale = round(10 * tenth, 6)
    return {"rope_scaling": scaling | {"mscale": scale, "mscale_all_dim": scale}}


def _qwen35_dense(meta: Metadata) -> Table:
    experts = (
        "num_experts",
        "moe_intermediate_size",
        "num_experts_per_tok",
        "shared_expert_intermediate_size",
    )
    table = {key: value for key, value in _qwen35(meta).items() if key not in experts}
    return table | {"model_type": "qwen3_5_text"}


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
    "gpt-oss": _gpt_oss,
    "deepseek2": _deepseek2,
    "qwen3next": _qwen35,
    "qwen35moe": _qwen35,
    "qwen35": _qwen35_dense,
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
