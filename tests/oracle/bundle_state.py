"""A bundle's weights, dequantised, under the names of the transformers model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers

from flashmoe.bundle.codecs import FfnLayout, TileCodec, dequantize_ffn
from flashmoe.bundle.reader import Bundle

ZERO_CENTRED = ("layernorm", "q_norm", "k_norm")  # and the final norm; the bundle holds 1 + w
IGNORED_CONFIG = (
    "architectures",
    "model_type",
    "dtype",
    "quantization",
    "quantization_config",
    "transformers_version",
)


def bundle_state(bundle: Bundle) -> dict[str, torch.Tensor]:
    """float32 state dict of a qwen3_5_moe bundle for `load_state_dict`."""
    state: dict[str, np.ndarray] = {}
    for name in bundle.tensor_names():
        root = name if name == "lm_head" else f"model.{name}"
        info, raw = bundle.tensor(name), bundle.read(name)
        if isinstance(info.codec, FfnLayout):
            parts = dequantize_ffn(info.codec, raw)
            state |= {
                f"{root}.{p}_proj.weight": v for p, v in zip(("gate", "up", "down"), parts, strict=True)
            }
        elif isinstance(info.codec, TileCodec):
            state[f"{root}.weight"] = info.codec.dequantize(raw, info.rows, info.cols)
        else:
            bare = name.endswith(("A_log", "dt_bias"))
            state[root if bare else f"{root}.weight"] = _vector(name, raw)
    for layer in bundle.expert_layers:
        state |= _experts(bundle, layer.layer, layer.count, layer.ffn)
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in state.items()}


def _vector(name: str, values: np.ndarray) -> np.ndarray:
    if name.endswith("conv1d"):
        return values[:, None, :]
    return values - np.float32(name == "norm" or name.endswith(ZERO_CENTRED))


def _experts(bundle: Bundle, layer: int, count: int, ffn: FfnLayout) -> dict[str, np.ndarray]:
    parts = [dequantize_ffn(ffn, bundle.read_expert(layer, expert)) for expert in range(count)]
    prefix = f"model.layers.{layer}.mlp.experts"
    return {
        f"{prefix}.gate_up_proj": np.stack([np.concatenate([gate, up]) for gate, up, _ in parts]),
        f"{prefix}.down_proj": np.stack([down for _, _, down in parts]),
    }


def model_of(bundle: Bundle) -> Any:
    """The float32 transformers model of a qwen3_5_moe bundle."""
    fields = {key: value for key, value in bundle.text_config.items() if key not in IGNORED_CONFIG}
    config = transformers.Qwen3_5MoeTextConfig(**fields)
    config._attn_implementation = config._experts_implementation = "eager"
    model = transformers.Qwen3_5MoeForCausalLM(config).eval().float()
    result = model.load_state_dict(bundle_state(bundle), strict=False)
    assert not result.unexpected_keys, result.unexpected_keys
    assert set(result.missing_keys) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    return model
