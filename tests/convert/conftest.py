"""One set of tiny random weights, written in every form that checkpoints come in.

Shares no code with the readers it tests: names, packing and dequantisation are spelled out here again.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

Array = NDArray[Any]
H, V, E, I, IS = 64, 48, 4, 32, 64  # noqa: E741  the letters of the format
HK, HV, DK, DV, CONV = 2, 4, 16, 16, 4
HQ, HKV, D = 2, 1, 32

CONFIG: dict[str, Any] = {
    "model_type": "qwen3_5_moe_text",
    "vocab_size": V,
    "hidden_size": H,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": HQ,
    "num_key_value_heads": HKV,
    "head_dim": D,
    "linear_num_key_heads": HK,
    "linear_num_value_heads": HV,
    "linear_key_head_dim": DK,
    "linear_value_head_dim": DV,
    "linear_conv_kernel_dim": CONV,
    "num_experts": E,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": I,
    "shared_expert_intermediate_size": IS,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "eos_token_id": 3,
}


class Stored(NamedTuple):
    """A tensor as bytes of a safetensors type."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def bf16_bits(values: Array) -> Array:
    """Truncation: the tiny weights are bf16 already."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def bf16_values(values: Array) -> Array:
    return (bf16_bits(values).astype(np.uint32) << 16).view(np.float32)


def stored(values: Array, dtype: str = "BF16") -> Stored:
    if dtype == "BF16":
        return Stored(dtype, values.shape, bf16_bits(values).tobytes())
    return Stored(
        dtype, values.shape, values.astype({"F16": "<f2", "F32": "<f4", "U32": "<u4"}[dtype]).tobytes()
    )


def write_safetensors(
    path: Path, tensors: Mapping[str, Stored], metadata: Mapping[str, str] | None = None
) -> None:
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(t.data for t in tensors.values()))


def mlx_quantized(
    rng: np.random.Generator, shape: tuple[int, ...], bits: int, group: int
) -> dict[str, Array]:
    """Random codes, scales and biases; scales and biases are bf16 values."""
    groups = (*shape[:-1], shape[-1] // group)
    return {
        "codes": rng.integers(0, 1 << bits, shape, dtype=np.uint8),
        "scales": bf16_values(rng.uniform(-0.02, 0.02, groups).astype(np.float32)),
        "biases": bf16_values(rng.uniform(-0.2, 0.2, groups).astype(np.float32)),
    }


def mlx_dequantized(matrix: Mapping[str, Array]) -> Array:
    """scales * code + biases in float32, by the words of the MLX format."""
    group = matrix["codes"].shape[-1] // matrix["scales"].shape[-1]
    scales, biases = (
        np.repeat(matrix[part], group, axis=-1).astype(np.float32) for part in ("scales", "biases")
    )
    product = (scales * matrix["codes"].astype(np.float32)).astype(np.float32)
    return (product + biases).astype(np.float32)


def pack_u32(codes: Array, bits: int) -> Array:
    """Element i of a row at its bits i * bits, least significant first."""
    planes = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    stream = np.packbits(planes.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")
    return np.ascontiguousarray(stream).view("<u4")


class TinyModel:
    """Weights by canonical name (``layers.0.mlp.gate``); experts stacked [E, rows, cols]."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.vectors = {"norm": self._vector(H), **self._layer_vectors()}
        self.matrices = {name: self._matrix(*shape) for name, shape in matrix_shapes().items()}

    def _vector(self, *shape: int) -> Array:
        return bf16_values(self.rng.normal(0, 0.1, shape).astype(np.float32))

    def _matrix(self, *shape: int) -> Array:
        return bf16_values(self.rng.normal(0, 0.05, shape).astype(np.float32))

    def _layer_vectors(self) -> dict[str, Array]:
        linear, full = "layers.0.linear_attn", "layers.1.self_attn"
        vectors = {f"{linear}.conv1d": self._vector(2 * HK * DK + HV * DV, 1, CONV)}
        vectors |= {f"{linear}.{n}": self._vector(HV) for n in ("A_log", "dt_bias")}
        vectors |= {f"{linear}.norm": self._vector(DV)}
        vectors |= {f"{full}.{n}": self._vector(D) for n in ("q_norm", "k_norm")}
        norms = ("input_layernorm", "post_attention_layernorm")
        return vectors | {f"layers.{i}.{n}": self._vector(H) for i in range(2) for n in norms}

    def hugging_face(
        self, prefix: str = "model.", fused: bool = True, dtype: str = "BF16"
    ) -> dict[str, Stored]:
        tensors = {}
        for name, values in self.vectors.items():
            bare = name.endswith(("A_log", "dt_bias"))
            tensors[f"{prefix}{name}" + ("" if bare else ".weight")] = stored(values, dtype)
        for name, values in self.matrices.items():
            if ".experts." not in name:
                tensors["lm_head.weight" if name == "lm_head" else f"{prefix}{name}.weight"] = stored(
                    values, dtype
                )
        for layer in range(2):
            tensors |= self._experts(f"layers.{layer}.mlp.experts", prefix, fused, dtype)
        return tensors

    def _experts(self, name: str, prefix: str, fused: bool, dtype: str) -> dict[str, Stored]:
        gate, up, down = (self.matrices[f"{name}.{part}_proj"] for part in ("gate", "up", "down"))
        if fused:
            pair = np.concatenate([gate, up], axis=1)
            return {
                f"{prefix}{name}.gate_up_proj": stored(pair, dtype),
                f"{prefix}{name}.down_proj": stored(down, dtype),
            }
        parts = {"gate": gate, "up": up, "down": down}
        return {
            f"{prefix}{name}.{e}.{part}_proj.weight": stored(values[e], dtype)
            for e in range(E)
            for part, values in parts.items()
        }

    def qwen3_next(self) -> dict[str, Stored]:
        """The same model with the projections of linear attention grouped per key head."""
        tensors = self.hugging_face(fused=False)
        for part in ("qkv", "z", "a", "b"):
            del tensors[f"model.layers.0.linear_attn.in_proj_{part}.weight"]
        per_head = {n: np.split(v, HK) for n, v in self._flat_projections().items()}
        qkvz = np.concatenate([per_head[n][i] for i in range(HK) for n in ("q", "k", "v", "z")])
        ba = np.concatenate([per_head[n][i] for i in range(HK) for n in ("b", "a")])
        tensors["model.layers.0.linear_attn.in_proj_qkvz.weight"] = stored(qkvz)
        tensors["model.layers.0.linear_attn.in_proj_ba.weight"] = stored(ba)
        return tensors

    def _flat_projections(self) -> dict[str, Array]:
        linear = {n: self.matrices[f"layers.0.linear_attn.in_proj_{n}"] for n in ("qkv", "z", "a", "b")}
        q, k, v = np.split(linear.pop("qkv"), [HK * DK, 2 * HK * DK])
        return {"q": q, "k": k, "v": v, **linear}

    def mlx(
        self, prefix: str, forms: Callable[[str], tuple[int, int]], scale_dtype: str = "BF16"
    ) -> tuple[dict[str, Stored], dict[str, Array], dict[str, Any]]:
        """Tensors, the values a reader must find by canonical name, the quantization table of config.json."""
        tensors: dict[str, Stored] = {}
        truth: dict[str, Array] = {}
        table: dict[str, Any] = {"group_size": 64, "bits": 4, "mode": "affine"}
        for name, values in self.vectors.items():
            bare = name.endswith(("A_log", "dt_bias"))
            centred = name.endswith("norm") and not name.endswith("linear_attn.norm")
            values = bf16_values(values + np.float32(centred))
            shaped = values.transpose(0, 2, 1) if name.endswith("conv1d") else values
            tensors[f"{prefix}model.{name}" + ("" if bare else ".weight")] = stored(shaped)
            truth[name] = values
        for name, shape in matrix_shapes().items():
            bits, group = forms(name)
            matrix = mlx_quantized(self.rng, shape, bits, group)
            module = (
                prefix + ("" if name == "lm_head" else "model.") + name.replace(".experts.", ".switch_mlp.")
            )
            tensors[f"{module}.weight"] = stored(pack_u32(matrix["codes"], bits), "U32")
            tensors |= {
                f"{module}.{part}": stored(matrix[part], scale_dtype) for part in ("scales", "biases")
            }
            table[module] = {"group_size": group, "bits": bits}
            truth[name] = mlx_dequantized(matrix)
        return tensors, truth, table


def matrix_shapes() -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every matrix."""
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (V, H), "lm_head": (V, H)}
    linear, full = "layers.0.linear_attn", "layers.1.self_attn"
    shapes |= {f"{linear}.in_proj_qkv": (2 * HK * DK + HV * DV, H), f"{linear}.in_proj_z": (HV * DV, H)}
    shapes |= {
        f"{linear}.in_proj_a": (HV, H),
        f"{linear}.in_proj_b": (HV, H),
        f"{linear}.out_proj": (H, HV * DV),
    }
    shapes |= {
        f"{full}.q_proj": (2 * HQ * D, H),
        f"{full}.k_proj": (HKV * D, H),
        f"{full}.v_proj": (HKV * D, H),
    }
    shapes[f"{full}.o_proj"] = (H, HQ * D)
    for layer in range(2):
        mlp = f"layers.{layer}.mlp"
        shapes |= {f"{mlp}.gate": (E, H), f"{mlp}.shared_expert_gate": (1, H)}
        for expert, lead, size in (("shared_expert", (), IS), ("experts", (E,), I)):
            shapes |= {f"{mlp}.{expert}.{part}_proj": (*lead, size, H) for part in ("gate", "up")}
            shapes[f"{mlp}.{expert}.down_proj"] = (*lead, H, size)
    return shapes


class Forms(NamedTuple):
    """What the tests need from this file (pytest imports it as no module)."""

    model: type[TinyModel]
    write: Callable[..., Path]
    config: dict[str, Any]
    stored: Callable[..., Stored]
    shapes: Callable[[], dict[str, tuple[int, ...]]]


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Stored], config: Mapping[str, Any] = CONFIG, shards: int = 1
) -> Path:
    """A checkpoint directory; with several shards, tensors are dealt out in runs, with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    names = list(tensors)
    files = {
        n: f"model-{i * shards // len(names) + 1:05d}-of-{shards:05d}.safetensors"
        for i, n in enumerate(names)
    }
    for file in sorted(set(files.values())):
        write_safetensors(folder / file, {n: tensors[n] for n in names if files[n] == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


@pytest.fixture
def forms() -> Forms:
    return Forms(TinyModel, write_checkpoint, CONFIG, stored, matrix_shapes)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A sharded Hugging Face checkpoint."""
    return write_checkpoint(tmp_path / "source", TinyModel().hugging_face(), shards=3)
