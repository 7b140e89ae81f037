"""What config.json says of a checkpoint's quantisation, as far as the tensors themselves do not tell."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flashmoe.errors import CheckpointError

_METHODS = ("awq", "compressed-tensors", "fp8", "gptq", "mxfp4")
_MLX_MODES = ("affine", "mxfp4")
_MAX_BLOCK = 1 << 16


@dataclass(frozen=True)
class Quantization:
    """``stated``: MLX's (bits, group) by module path, the default under ''."""

    method: str | None = None
    stated: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    block: tuple[int, int] | None = None  # of FP8: rows and columns that share a scale
    act_order: bool = False  # GPTQ: columns belong to groups in an order of their own
    packed_bits: frozenset[int] = frozenset()  # compressed-tensors: those of any group of modules
    zero_offset: int = 1  # GPTQ: what is added to stored zero points; version 2 of the format adds none


def read_quantization(config: Mapping[str, Any], canonical: Callable[[str], str]) -> Quantization:
    """Parse it; raises CheckpointError, naming it, for a quantisation that flashmoe does not read."""
    mlx = "quantization" in config
    table = config.get("quantization", config.get("quantization_config"))
    if not isinstance(table, dict):
        text = config.get("text_config")
        table = text.get("quantization_config") if isinstance(text, dict) else None
    if not isinstance(table, dict):
        return Quantization()
    method = None if mlx else table.get("quant_method")
    if method is None:
        if table.get("mode", "affine") not in _MLX_MODES:
            raise _unread(table["mode"])
        return Quantization(stated=_stated(table, canonical))
    if method not in _METHODS:
        raise _unread(method)
    _check_variant(method, table)
    return Quantization(
        method,
        block=_block(table.get("weight_block_size")),
        act_order=table.get("desc_act") is True,
        packed_bits=_packed_bits(table.get("config_groups")),
        zero_offset=0 if "gptq_v2" in (table.get("checkpoint_format"), table.get("format")) else 1,
    )


def _check_variant(method: str, table: Mapping[str, Any]) -> None:
    """Refuse layouts of the same tensors that mean something else."""
    layout = table.get("checkpoint_format") if method == "gptq" else table.get("version")
    if method == "gptq" and layout not in (None, "", "gptq", "gptq_v2"):
        raise _unread(f"gptq in the layout {layout}")
    if method == "awq" and str(layout or "gemm").lower() != "gemm":
        raise _unread(f"awq in the layout {layout}")
    if method == "fp8" and table.get("fmt", "e4m3") != "e4m3":
        raise _unread(f"fp8 {table['fmt']}")


def _block(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    if (
        not isinstance(value, list)
        or len(value) != 2
        or any(type(size) is not int or not 0 < size <= _MAX_BLOCK for size in value)
    ):
        raise CheckpointError(
            f"config.json: weight_block_size is {reprlib.repr(value)}, must be two sizes: download it again"
        )
    return value[0], value[1]


def _packed_bits(groups: Any) -> frozenset[int]:
    schemes = [g for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    weights = [scheme["weights"] for scheme in schemes if isinstance(scheme.get("weights"), dict)]
    return frozenset(w["num_bits"] for w in weights if type(w.get("num_bits")) is int)


def _stated(table: Mapping[str, Any], canonical: Callable[[str], str]) -> dict[str, tuple[int, int]]:
    """Module path -> (bits, group) as config.json states them; the key '' is the default."""
    stated: dict[str, tuple[int, int]] = {}
    for key, value in {"": table, **table}.items():
        if (
            isinstance(value, dict)
            and type(value.get("bits")) is int
            and type(value.get("group_size")) is int
        ):
            form = value["bits"], value["group_size"]
            stated[key] = form
            stated.setdefault(canonical(key), form)
    return stated


def _unread(kind: object) -> CheckpointError:
    return CheckpointError(
        f"config.json says {reprlib.repr(kind)} quantisation, which flashmoe does not read:"
        " use a bf16, FP8, GPTQ, AWQ, compressed-tensors, MXFP4, MLX or GGUF variant"
    )
