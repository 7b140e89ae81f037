"""Writes one set of tiny weights in each file form that users have (needs torch and safetensors).

Independent of flashmoe on purpose: nothing here shares code with the readers that it tests.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tiny_weights import FULL, Affine, TinySpec, Weights

TORCH_DTYPE = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
Tensors = dict[str, torch.Tensor]


def text_config(spec: TinySpec) -> dict[str, Any]:
    """The text part of config.json with the key names of real files."""
    rope = {"rope_type": "default", "rope_theta": spec.rope_theta, "partial_rotary_factor": 0.25}
    config: dict[str, Any] = {
        "model_type": "qwen3_next" if spec.model_type == "qwen3_next" else "qwen3_5_moe_text",
        "vocab_size": spec.vocab,
        "hidden_size": spec.hidden,
        "hidden_act": "silu",
        "num_hidden_layers": len(spec.layer_types),
        "layer_types": list(spec.layer_types),
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "linear_conv_kernel_dim": spec.conv,
        "linear_key_head_dim": spec.k_dim,
        "linear_value_head_dim": spec.v_dim,
        "linear_num_key_heads": spec.k_heads,
        "linear_num_value_heads": spec.v_heads,
        "moe_intermediate_size": spec.moe,
        "shared_expert_intermediate_size": spec.shared,
        "num_experts": spec.experts,
        "num_experts_per_tok": spec.top_k,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": spec.tied,
        "rope_parameters": rope,
    }
    if spec.model_type == "qwen3_next":
        return config | {
            "intermediate_size": spec.dense,
            "mlp_only_layers": list(spec.dense_layers),
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
        }
    pairs = int(spec.head_dim * 0.25) // 2
    rope |= {"mrope_section": [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3], "mrope_interleaved": True}
    return config


def multimodal_config(spec: TinySpec) -> dict[str, Any]:
    """config.json as the released multimodal checkpoints have it; layer kinds by interval where enough."""
    text = text_config(spec) | {
        "attn_output_gate": True,
        "mamba_ssm_dtype": "float32",
        "mtp_num_hidden_layers": 1,
    }
    interval = spec.layer_types.index(FULL) + 1
    if all((kind == FULL) == ((i + 1) % interval == 0) for i, kind in enumerate(spec.layer_types)):
        del text["layer_types"]
        text["full_attention_interval"] = interval
    vision = {
        "model_type": "qwen3_5_moe",
        "depth": 1,
        "hidden_size": 32,
        "num_heads": 2,
        "out_hidden_size": spec.hidden,
    }
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "image_token_id": spec.vocab - 4,
        "video_token_id": spec.vocab - 3,
        "vision_start_token_id": spec.vocab - 2,
        "vision_end_token_id": spec.vocab - 1,
        "text_config": text,
        "tie_word_embeddings": spec.tied,
        "vision_config": vision,
    }


def hf_state(weights: Weights, prefix: str = "model.") -> Tensors:
    """float32 state dict with fused experts: what `load_state_dict` of the transformers model takes."""
    state: Tensors = {}
    for path, value in weights.items():
        array = value.values() if isinstance(value, Affine) else value
        if path.endswith("mlp.experts.up_proj"):
            continue  # goes into gate_up_proj, gate rows first
        if path.endswith("mlp.experts.gate_proj"):
            up = weights[path.replace("gate_proj", "up_proj")]
            assert isinstance(up, Affine)
            array = np.concatenate([array, up.values()], axis=1)
            path = path.replace("gate_proj", "gate_up_proj")
        bare = path.endswith(("A_log", "dt_bias", "gate_up_proj", "experts.down_proj"))
        root = "" if path == "lm_head" else prefix
        state[f"{root}{path}" + ("" if bare else ".weight")] = torch.from_numpy(np.ascontiguousarray(array))
    return state


def as_dtype(state: Tensors, dtype: str) -> Tensors:
    """Casts all but A_log, and insists that the cast changes nothing."""
    cast = {n: t if n.endswith("A_log") else t.to(TORCH_DTYPE[dtype]).contiguous() for n, t in state.items()}
    inexact = [name for name in state if not torch.equal(cast[name].float(), state[name])]
    assert not inexact, f"not exact in {dtype}: {inexact[:3]}"
    return cast


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Indented JSON with a final newline."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_fused(folder: Path, spec: TinySpec, weights: Weights, dtype: str) -> None:
    """Text-only checkpoint in one file, experts fused into gate_up_proj and down_proj."""
    folder.mkdir(parents=True)
    config = text_config(spec) | {"architectures": ["Qwen3_5MoeForCausalLM"]}
    write_json(folder / "config.json", config)
    save_file(as_dtype(hf_state(weights), dtype), folder / "model.safetensors", {"format": "pt"})


def write_multimodal(folder: Path, spec: TinySpec, weights: Weights, dtype: str, shards: int = 3) -> None:
    """The released form: nested config, long prefix, fused experts, vision and MTP tensors, shards, index."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", multimodal_config(spec))
    tensors = as_dtype(hf_state(weights, "model.language_model."), dtype) | _extra_tensors(spec)
    names = sorted(tensors)
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    # Round robin, so that neighbours (gate_up_proj and down_proj, qkv and z) lie in different shards.
    home = {name: files[i % shards] for i, name in enumerate(names)}
    for file in files:
        save_file({n: tensors[n] for n in names if home[n] == file}, folder / file, {"format": "pt"})
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": home}
    )


def _extra_tensors(spec: TinySpec) -> Tensors:
    """Vision and multi-token-prediction tensors: noise that a text engine must skip."""
    rng = np.random.default_rng(spec.seed + 1)
    shapes = {
        "model.visual.patch_embed.proj.weight": (32, 3, 1, 2, 2),
        "model.visual.blocks.0.attn.qkv.weight": (96, 32),
        "model.visual.merger.norm.bias": (32,),
        "mtp.fc.weight": (spec.hidden, 16),
        "mtp.norm.weight": (spec.hidden,),
        "mtp.layers.0.self_attn.k_norm.weight": (spec.head_dim,),
        "mtp.layers.0.mlp.experts.0.down_proj.weight": (spec.hidden, 16),
    }
    noise = {name: rng.normal(0.0, 1.0, shape).astype(np.float32) for name, shape in shapes.items()}
    return {name: torch.from_numpy(array).to(torch.bfloat16) for name, array in noise.items()}


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """MLX packing: codes [..., cols] as one little-endian bit stream in uint32 [..., cols * bits / 32]."""
    planes = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    stream = np.packbits(planes.reshape(*codes.shape[:-1], -1).astype(np.uint8), axis=-1, bitorder="little")
    return stream.view("<u4")


def mlx_name(path: str) -> str:
    """Module path in an MLX file."""
    if path == "lm_head":
        return "language_model.lm_head"
    return "language_model.model." + path.replace("mlp.experts.", "mlp.switch_mlp.")


def mlx_state(spec: TinySpec, weights: Weights) -> Tensors:
    """Tensors of an MLX affine checkpoint: packed codes, norms as 1 + w, conv1d as [C, K, 1], A_log f32."""
    dtype, state = TORCH_DTYPE[spec.scale_dtype], Tensors()
    for path, value in weights.items():
        name = mlx_name(path)
        if isinstance(value, Affine):
            state[f"{name}.weight"] = torch.from_numpy(
                pack_bits(value.codes, value.bits).view(np.int32)
            ).view(torch.uint32)
            state[f"{name}.scales"] = torch.from_numpy(value.scales).to(dtype)
            state[f"{name}.biases"] = torch.from_numpy(value.biases).to(dtype)
        elif path.endswith(("A_log", "dt_bias")):
            state[name] = torch.from_numpy(value).to(torch.float32 if path.endswith("A_log") else dtype)
        else:
            centred = path.endswith("norm") and not path.endswith("linear_attn.norm")
            array = value.transpose(0, 2, 1) if path.endswith("conv1d") else value + np.float32(centred)
            state[f"{name}.weight"] = torch.from_numpy(np.ascontiguousarray(array)).to(dtype)
    return state


def write_mlx(folder: Path, spec: TinySpec, weights: Weights, nested: bool) -> None:
    """MLX affine checkpoint in one file; `quantization` names every module that departs from the default."""
    folder.mkdir(parents=True)
    flat = text_config(spec) | {"architectures": ["Qwen3_5MoeForCausalLM"]}
    config = multimodal_config(spec) if nested else flat
    block: dict[str, Any] = {"group_size": spec.group, "bits": spec.bits, "mode": "affine"}
    for path, value in weights.items():
        if isinstance(value, Affine) and (value.bits, value.group) != (spec.bits, spec.group):
            block[mlx_name(path)] = {"group_size": value.group, "bits": value.bits}
    write_json(folder / "config.json", config | {"quantization": block, "quantization_config": block})
    save_file(mlx_state(spec, weights), folder / "model.safetensors", {"format": "mlx"})
