"""Random matrices in the quantised forms that checkpoints have, with the values that a reader must find.

Shares no code with the readers: each form is packed here from its published description.  The keys of ``tensors``
follow a module's name.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
ITEMS = {
    "F32": "<f4",
    "F16": "<f2",
    "I32": "<i4",
    "U32": "<u4",
    "U8": "u1",
    "I8": "i1",
    "F8_E4M3": "u1",
    "I64": "<i8",
}


class Stored(NamedTuple):
    """A tensor as bytes of a safetensors type."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Packed(NamedTuple):
    """A packed matrix and its float32 values [rows, cols]; ``config``: what config.json says of such a checkpoint."""

    tensors: dict[str, Stored]
    values: Array
    config: dict[str, Any]


def stored(values: Array, dtype: str) -> Stored:
    if dtype == "BF16":
        raw = (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype("<u2")
        return Stored(dtype, values.shape, raw.tobytes())
    return Stored(dtype, values.shape, np.ascontiguousarray(values.astype(ITEMS[dtype])).tobytes())


def bf16(values: Array) -> Array:
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


def write_safetensors(path: Path, tensors: Mapping[str, Stored]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(t.data for t in tensors.values()))


def bit_stream(codes: Array, bits: int) -> Array:
    """u32 words along the last axis: code i at bits i * bits."""
    planes = (codes[..., None].astype(np.uint8) >> np.arange(bits, dtype=np.uint8)) & 1
    flat = planes.reshape(*codes.shape[:-1], -1)
    missing = -flat.shape[-1] % 32
    flat = np.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, missing)])
    return np.ascontiguousarray(np.packbits(flat, axis=-1, bitorder="little")).view("<u4")


def e4m3_value(code: int) -> float:
    sign, exponent, fraction = -1 if code & 128 else 1, code >> 3 & 15, code & 7
    return sign * (fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))


E4M3 = np.array([e4m3_value(c) for c in range(256)], np.float32)
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def e4m3_codes(rng: np.random.Generator, *shape: int) -> Array:
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    return np.where(codes & 127 == 127, 0, codes).astype(np.uint8)


def fp8_block(rng: np.random.Generator, rows: int, cols: int, block: int = 128, dtype: str = "F32") -> Packed:
    codes = e4m3_codes(rng, rows, cols)
    grid = bf16(rng.uniform(1e-4, 1e-3, (-(-rows // block), -(-cols // block))).astype(np.float32))
    spread = np.repeat(np.repeat(grid, block, 0)[:rows], block, 1)[:, :cols]
    tensors = {".weight": stored(codes, "F8_E4M3"), ".weight_scale_inv": stored(grid, dtype)}
    config = {"quant_method": "fp8", "weight_block_size": [block, block], "activation_scheme": "dynamic"}
    return Packed(tensors, E4M3[codes] * spread, config)


def fp8_channel(rng: np.random.Generator, rows: int, cols: int) -> Packed:
    codes, scale = e4m3_codes(rng, rows, cols), bf16(rng.uniform(1e-4, 1e-3, (rows, 1)).astype(np.float32))
    tensors = {".weight": stored(codes, "F8_E4M3"), ".weight_scale": stored(scale, "BF16")}
    return Packed(
        tensors, E4M3[codes] * scale, {"quant_method": "compressed-tensors", "format": "float-quantized"}
    )


def fp8_tensor(rng: np.random.Generator, rows: int, cols: int) -> Packed:
    codes = e4m3_codes(rng, rows, cols)
    tensors = {".weight": stored(codes, "F8_E4M3"), ".weight_scale": stored(np.array(0.001), "F32")}
    return Packed(tensors, E4M3[codes] * np.float32(0.001), {"quant_method": "fp8"})


def int8_channel(rng: np.random.Generator, rows: int, cols: int) -> Packed:
    codes = rng.integers(-128, 128, (rows, cols)).astype(np.int8)
    scale = bf16(rng.uniform(1e-4, 1e-3, (rows, 1)).astype(np.float32))
    tensors = {".weight": stored(codes, "I8"), ".weight_scale": stored(scale, "BF16")}
    return Packed(tensors, codes * scale, {"quant_method": "compressed-tensors", "format": "int-quantized"})


def gptq(
    rng: np.random.Generator,
    rows: int,
    cols: int,
    bits: int = 4,
    group: int = 32,
    version: int = 1,
    order: bool = False,
    symmetric: bool = True,
) -> Packed:
    groups = -(-cols // group)
    codes = rng.integers(0, 1 << bits, (cols, rows))
    zeros = (
        np.full((groups, rows), 1 << (bits - 1)) if symmetric else rng.integers(1, 1 << bits, (groups, rows))
    )
    scales = rng.uniform(1e-3, 1e-2, (groups, rows)).astype(np.float16)
    index = np.arange(cols) // group
    if order:
        index = rng.permutation(index)
    tensors = {
        ".qweight": stored(bit_stream(codes.T, bits).T, "I32"),
        ".qzeros": stored(bit_stream(zeros - (version == 1), bits), "I32"),
        ".scales": stored(scales, "F16"),
        ".g_idx": stored(index, "I32"),
    }
    values = (codes - zeros[index]) * scales.astype(np.float32)[index]
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": order, "sym": symmetric}
    config["checkpoint_format"] = "gptq" if version == 1 else "gptq_v2"
    return Packed(tensors, values.T.astype(np.float32), config)


def awq(rng: np.random.Generator, rows: int, cols: int, group: int = 32, symmetric: bool = False) -> Packed:
    groups = cols // group
    codes, zeros = rng.integers(0, 16, (cols, rows)), rng.integers(0, 16, (groups, rows))
    if symmetric:
        zeros[:] = 8
    scales = rng.uniform(1e-3, 1e-2, (groups, rows)).astype(np.float16)

    def pack(values: Array) -> Array:
        """AutoAWQ: nibble i of a word is its element (0, 2, 4, 6, 1, 3, 5, 7)[i]."""
        words = np.zeros((len(values), rows // 8), np.uint32)
        for nibble, element in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            words |= values.astype(np.uint32)[:, element::8] << np.uint32(4 * nibble)
        return words.view(np.int32)

    tensors = {
        ".qweight": stored(pack(codes), "I32"),
        ".qzeros": stored(pack(zeros), "I32"),
        ".scales": stored(scales, "F16"),
    }
    index = np.arange(cols) // group
    values = (codes - zeros[index]) * scales.astype(np.float32)[index]
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    return Packed(tensors, values.T.astype(np.float32), config)


def packed_int(
    rng: np.random.Generator,
    rows: int,
    cols: int,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    order: bool = False,
) -> Packed:
    """compressed-tensors' pack-quantized; group = cols: one scale a row."""
    groups, half = cols // group, 1 << (bits - 1)
    codes, scales = rng.integers(-half, half, (rows, cols)), bf16(rng.uniform(1e-3, 1e-2, (rows, groups)))
    zeros = np.zeros((rows, groups), np.int64) if symmetric else rng.integers(-half, half, (rows, groups))
    index = np.arange(cols) // group
    tensors = {
        ".weight_packed": stored(bit_stream(codes + half, bits), "I32"),
        ".weight_scale": stored(scales, "BF16"),
        ".weight_shape": stored(np.array([rows, cols]), "I64"),
    }
    if not symmetric:
        tensors[".weight_zero_point"] = stored(bit_stream((zeros + half).T, bits).T, "I32")
    if order:
        index = rng.permutation(index)
        tensors[".weight_g_idx"] = stored(index, "I32")
    values = (codes - zeros[:, index]) * scales[:, index]
    scheme = {"weights": {"num_bits": bits, "type": "int", "symmetric": symmetric}, "targets": ["Linear"]}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": scheme},
    }
    return Packed(tensors, values.astype(np.float32), config)


def nvfp4(rng: np.random.Generator, rows: int, cols: int) -> Packed:
    codes, scales = rng.integers(0, 16, (rows, cols)), rng.integers(1, 127, (rows, cols // 16))
    divisor = np.float32(300)
    tensors = {
        ".weight_packed": stored(codes[:, ::2] | codes[:, 1::2] << 4, "U8"),
        ".weight_scale": stored(scales, "F8_E4M3"),
        ".weight_global_scale": stored(np.array([divisor]), "F32"),
    }
    values = FP4[codes] * np.repeat(E4M3[scales] / divisor, 16, axis=1)
    config = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    return Packed(tensors, values.astype(np.float32), config)


def mxfp4(rng: np.random.Generator, rows: int, cols: int) -> Packed:
    """compressed-tensors' mxfp4-pack-quantized."""
    codes, powers = rng.integers(0, 16, (rows, cols)), rng.integers(110, 130, (rows, cols // 32))
    tensors = {
        ".weight_packed": stored(codes[:, ::2] | codes[:, 1::2] << 4, "U8"),
        ".weight_scale": stored(powers, "U8"),
    }
    values = FP4[codes] * np.repeat(2.0 ** (powers - 127.0), 32, axis=1)
    config = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}
    return Packed(tensors, values.astype(np.float32), config)


def mxfp4_blocks(rng: np.random.Generator, rows: int, cols: int) -> Packed:
    """gpt-oss: ``_blocks`` [rows, groups, 16] and ``_scales`` [rows, groups]."""
    packed = mxfp4(rng, rows, cols)
    blocks, powers = packed.tensors[".weight_packed"], packed.tensors[".weight_scale"]
    tensors = {"_blocks": Stored("U8", (rows, cols // 32, 16), blocks.data), "_scales": powers}
    return Packed(tensors, packed.values, {"quant_method": "mxfp4"})


Maker = Callable[..., Packed]
# Name -> (maker, its options, whether codes are taken over without loss).
FORMS: dict[str, tuple[Maker, dict[str, Any], bool]] = {
    "fp8 block": (fp8_block, {}, False),
    "fp8 block of 64, bf16 scales": (fp8_block, {"block": 64, "dtype": "BF16"}, False),
    "fp8 channel": (fp8_channel, {}, False),
    "fp8 tensor": (fp8_tensor, {}, False),
    "int8 channel": (int8_channel, {}, True),
    "gptq": (gptq, {}, True),
    "gptq of 64, v2": (gptq, {"group": 64, "version": 2}, True),
    "gptq 2 bit": (gptq, {"bits": 2}, True),
    "gptq 3 bit": (gptq, {"bits": 3}, True),
    "gptq 8 bit": (gptq, {"bits": 8, "version": 2}, True),
    "gptq asymmetric": (gptq, {"symmetric": False}, False),
    "gptq act-order": (gptq, {"order": True}, False),
    "awq symmetric": (awq, {"symmetric": True}, True),
    "awq": (awq, {"group": 64}, False),
    "packed int4": (packed_int, {}, True),
    "packed int4 asymmetric": (packed_int, {"symmetric": False}, False),
    "packed int4 channel": (packed_int, {"group": None}, True),
    "packed int8": (packed_int, {"bits": 8}, True),
    "packed int3": (packed_int, {"bits": 3, "group": 64}, True),
    "packed int6 asymmetric": (packed_int, {"bits": 6, "symmetric": False}, False),
    "packed int4 act-order": (packed_int, {"order": True}, False),
    "nvfp4": (nvfp4, {}, False),
    "mxfp4": (mxfp4, {}, True),
    "mxfp4 blocks": (mxfp4_blocks, {}, True),
}


def make(form: str, rows: int, cols: int, seed: int = 0) -> Packed:
    """A matrix in one of FORMS."""
    maker, options, _ = FORMS[form]
    if "group" in options:
        options = options | {"group": min(options["group"] or cols, cols)}
    return maker(np.random.default_rng(seed), rows, cols, **options)


def write_checkpoint(folder: Path, tensors: Mapping[str, Stored], config: Mapping[str, Any]) -> Path:
    """A directory with config.json and one safetensors file."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder
