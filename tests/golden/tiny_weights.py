"""Random weights of tiny models, drawn on affine grids so that every file form below can hold them exactly.

Two kinds of grid:
  - lossless: scale = m * 2^e with a short mantissa m, bias = -k * scale, and every group uses its lowest and
    its highest code. A min/max quantiser then finds scale, bias and codes again exactly, and every value is
    exact in bfloat16, float16 and float32. Hugging Face forms use it: converting them loses nothing.
  - free: any 16-bit scale and bias, as MLX files have them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
LINEAR, FULL = "linear_attention", "full_attention"


@dataclass(frozen=True)
class Affine:
    """A matrix as value = scale * code + bias, one (scale, bias) per row and group of columns."""

    codes: NDArray[np.uint8]  # [..., rows, cols]
    scales: F32  # [..., rows, cols // group], exact in scale_dtype of the spec
    biases: F32  # as scales
    bits: int
    group: int

    def values(self) -> F32:
        """The float32 matrix, [..., rows, cols]: multiply, then add, each rounded once."""
        scale, bias = (np.repeat(x, self.group, -1) for x in (self.scales, self.biases))
        return np.asarray(scale * self.codes.astype(np.float32) + bias, np.float32)


Weights = dict[str, Affine | F32]


@dataclass(frozen=True)
class TinySpec:
    """Shape of one tiny model; `codecs` maps an ending of a module path to (bits, group)."""

    name: str
    seed: int
    model_type: str = "qwen3_5_moe"
    layer_types: tuple[str, ...] = (LINEAR, FULL)
    vocab: int = 96
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    k_heads: int = 2
    v_heads: int = 4
    k_dim: int = 16
    v_dim: int = 16
    conv: int = 4
    experts: int = 4
    top_k: int = 2
    moe: int = 64
    shared: int = 64
    dense_layers: tuple[int, ...] = ()
    dense: int = 64
    tied: bool = False
    rope_theta: float = 1e5
    lossless: bool = True
    scale_dtype: str = "bf16"
    bits: int = 4
    group: int = 64
    codecs: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def codec(self, module: str) -> tuple[int, int]:
        """(bits, group) of a module path; sensitive ones are 8 bit unless told otherwise.

        Sensitive are the gates of the MoE block, as in MLX files, and where the converter has to choose
        (lossless grids) the two projections of GatedDeltaNet with one row per head as well.
        """
        sensitive = ["mlp.gate", "mlp.shared_expert_gate"]
        if self.lossless:
            sensitive += ["linear_attn.in_proj_a", "linear_attn.in_proj_b", "linear_attn.in_proj_ba"]
        table = {end: (8, min(self.group, 64)) for end in sensitive} | dict(self.codecs)
        fits = [end for end in table if module.endswith(end)]
        return table[max(fits, key=len)] if fits else (self.bits, self.group)


def round_to(values: F32, dtype: str) -> F32:
    """The nearest numbers of a 16-bit type ("bf16" or "f16"), ties to even, as float32."""
    if dtype == "f16":
        return values.astype(np.float16).astype(np.float32)
    raw = np.ascontiguousarray(values, np.float32).view(np.uint32)
    kept = (raw + np.uint32(0x7FFF) + ((raw >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return kept.view(np.float32)


def draw_affine(
    rng: np.random.Generator, spec: TinySpec, module: str, shape: tuple[int, ...], std: float
) -> Affine:
    """A random matrix of standard deviation `std` on the grid that `spec` asks for."""
    bits, group = spec.codec(module)
    top = 2**bits - 1
    wanted = rng.normal(0.0, std, (*shape[:-1], shape[-1] // group, group))
    low, high = wanted.min(-1), wanted.max(-1)
    step = (high - low) / top
    if spec.lossless:
        exponent = np.floor(np.log2(step)) - (
            3 if bits == 4 else 0
        )  # 4-bit mantissa m (8..16), or a power of two
        scales = (np.rint(step / 2.0**exponent) * 2.0**exponent).astype(np.float32)
        biases = -(np.clip(np.rint(-low / scales), 0, top) * scales).astype(np.float32)
    else:
        scales, biases = (round_to(x.astype(np.float32), spec.scale_dtype) for x in (step, low))
    codes = np.clip(np.rint((wanted - biases[..., None]) / scales[..., None]), 0, top).astype(np.uint8)
    np.put_along_axis(codes, wanted.argmin(-1)[..., None], 0, -1)
    np.put_along_axis(codes, wanted.argmax(-1)[..., None], top, -1)
    return Affine(codes.reshape(shape), scales, biases, bits, group)


def matrix_shapes(spec: TinySpec) -> dict[str, tuple[int, ...]]:
    """Module path -> shape of every matrix; experts are stacked [experts, out, in]."""
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (spec.vocab, spec.hidden)}
    for layer, kind in enumerate(spec.layer_types):
        mixer = _linear_shapes(spec) if kind == LINEAR else _full_shapes(spec)
        mlp = _ffn_shapes("mlp", spec.dense, spec) if layer in spec.dense_layers else _moe_shapes(spec)
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in {**mixer, **mlp}.items()}
    return shapes if spec.tied else shapes | {"lm_head": (spec.vocab, spec.hidden)}


def _linear_shapes(spec: TinySpec) -> dict[str, tuple[int, ...]]:
    keys, values, h = spec.k_heads * spec.k_dim, spec.v_heads * spec.v_dim, spec.hidden
    out = {"linear_attn.out_proj": (h, values)}
    if spec.model_type == "qwen3_next":  # rows grouped by key head: q|k|v|z and b|a
        return out | {
            "linear_attn.in_proj_qkvz": (2 * keys + 2 * values, h),
            "linear_attn.in_proj_ba": (2 * spec.v_heads, h),
        }
    return out | {
        "linear_attn.in_proj_qkv": (2 * keys + values, h),
        "linear_attn.in_proj_z": (values, h),
        "linear_attn.in_proj_b": (spec.v_heads, h),
        "linear_attn.in_proj_a": (spec.v_heads, h),
    }


def _full_shapes(spec: TinySpec) -> dict[str, tuple[int, ...]]:
    return {
        "self_attn.q_proj": (2 * spec.heads * spec.head_dim, spec.hidden),
        "self_attn.k_proj": (spec.kv_heads * spec.head_dim, spec.hidden),
        "self_attn.v_proj": (spec.kv_heads * spec.head_dim, spec.hidden),
        "self_attn.o_proj": (spec.hidden, spec.heads * spec.head_dim),
    }


def _ffn_shapes(path: str, width: int, spec: TinySpec, *stack: int) -> dict[str, tuple[int, ...]]:
    wide, narrow = (*stack, width, spec.hidden), (*stack, spec.hidden, width)
    return {f"{path}.gate_proj": wide, f"{path}.up_proj": wide, f"{path}.down_proj": narrow}


def _moe_shapes(spec: TinySpec) -> dict[str, tuple[int, ...]]:
    return {
        "mlp.gate": (spec.experts, spec.hidden),
        "mlp.shared_expert_gate": (1, spec.hidden),
        **_ffn_shapes("mlp.experts", spec.moe, spec, spec.experts),
        **_ffn_shapes("mlp.shared_expert", spec.shared, spec),
    }


def _std(module: str, cols: int) -> float:
    """Gains that keep every block's share of the logits visible, and |logit| at a few units."""
    special = {"embed_tokens": 0.5, "lm_head": 0.2, "mlp.gate": 0.25, "self_attn.o_proj": 1.5 * cols**-0.5}
    ends = [end for end in special if module.endswith(end)]
    return special[ends[0]] if ends else cols**-0.5


def draw_weights(spec: TinySpec) -> Weights:
    """All weights of a tiny model by module path (no prefix, no ".weight"); norms zero-centred as in HF."""
    rng = np.random.default_rng(spec.seed)
    weights: Weights = {}
    for module, shape in matrix_shapes(spec).items():
        weights[module] = draw_affine(rng, spec, module, shape, _std(module, shape[-1]))
    for layer, kind in enumerate(spec.layer_types):
        vectors = _linear_vectors(rng, spec) if kind == LINEAR else _full_vectors(rng, spec)
        vectors |= {f"{n}_layernorm": _norm(rng, spec.hidden) for n in ("input", "post_attention")}
        weights |= {f"layers.{layer}.{name}": value for name, value in vectors.items()}
    return weights | {"norm": _norm(rng, spec.hidden)}


def _norm(rng: np.random.Generator, n: int, low: int = -24, high: int = 24) -> F32:
    """Zero-centred norm weights in 1/64 steps, so that both w and 1 + w are exact in 16 bits."""
    return (rng.integers(low, high, n) / 64.0).astype(np.float32)


def _linear_vectors(rng: np.random.Generator, spec: TinySpec) -> dict[str, F32]:
    channels = 2 * spec.k_heads * spec.k_dim + spec.v_heads * spec.v_dim
    conv = round_to(rng.normal(0.0, 0.6, (channels, 1, spec.conv)).astype(np.float32), "bf16")
    return {
        "linear_attn.conv1d": round_to(conv, "f16"),
        # float32 in every form, as real files have it: decay rates from slow to fast.
        "linear_attn.A_log": np.log(rng.uniform(0.05, 2.0, spec.v_heads)).astype(np.float32),
        "linear_attn.dt_bias": _norm(rng, spec.v_heads, -128, 64),
        "linear_attn.norm": 1.0 + _norm(rng, spec.v_dim),
    }


def _full_vectors(rng: np.random.Generator, spec: TinySpec) -> dict[str, F32]:
    return {f"self_attn.{n}": _norm(rng, spec.head_dim, 0, 64) for n in ("q_norm", "k_norm")}
