"""The shape of a bundle from a config alone: what a model would weigh, and the frame that synth fills."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flashmoe.bundle.codecs import FP4_TABLE, Codec, DenseCodec, FfnLayout, TileCodec
from flashmoe.checkpoint.quantization import read_quantization
from flashmoe.convert.bits import Bits, part_of
from flashmoe.errors import BundleError, ConfigError
from flashmoe.models.registry import find_family
from flashmoe.models.spec import FfnSpec, MatrixSpec, Spec, VectorSpec

_FP4 = TileCodec(4, 32, "bf16", FP4_TABLE)


@dataclass(frozen=True)
class Slot:
    """A resident tensor without its values."""

    name: str
    codec: Codec
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Outline:
    """All resident tensors in file order, and the layers with ``expert_count`` experts of layout ``ffn``.

    ``ffn`` is None when no layer has experts.
    """

    tied: bool
    resident: Sequence[Slot]
    expert_layers: Sequence[int]
    expert_count: int
    ffn: FfnLayout | None


def make_outline(raw: Mapping[str, Any], bits: Bits) -> Outline:
    """The bundle of a float model converted with ``bits``; raises ConfigError for an unusable config.

    Experts that config.json says are in MXFP4 keep it, as they would be kept.
    """
    family = find_family(raw)
    config = family.config(raw)
    spec = family.spec(config)
    try:
        resident = tuple(_slot(item, bits, spec.tied) for item in spec.resident)
        ffn = None
        if spec.experts:
            ffn = _experts(raw, config.hidden_size, config.moe_intermediate_size, bits)
            ffn = replace(ffn, glu=spec.experts[0].glu, biased=spec.experts[0].biased)
    except BundleError as error:
        raise ConfigError(f"config.json: {error}: flashmoe cannot tile this model") from error
    layers = tuple(item.layer for item in spec.experts)
    return Outline(spec.tied, resident, layers, config.num_experts, ffn)


def _slot(spec: Spec, bits: Bits, tied: bool) -> Slot:
    if isinstance(spec, VectorSpec):
        return Slot(spec.name, DenseCodec("f32"), spec.shape)
    if isinstance(spec, FfnSpec):
        layout = _layout(spec.hidden, spec.intermediate, bits.matrix_bits(part_of(spec), spec.name))
        return Slot(spec.name, layout, (spec.intermediate, spec.hidden))
    assert isinstance(spec, MatrixSpec)
    part = bits.of_tied_table() if tied and spec.name == "embed_tokens" else part_of(spec)
    codec = _tile(bits.matrix_bits(part, spec.name, spec.role == "sensitive"), spec.source.cols)
    shape = spec.source.picked_rows, spec.source.cols
    codec.matrix_shape(*shape)
    return Slot(spec.name, codec, shape)


def _experts(raw: Mapping[str, Any], hidden: int, intermediate: int, bits: Bits) -> FfnLayout:
    """As choose_form() would have it of a whole layer."""
    wanted = bits.parts.get("experts", bits.uniform)
    if read_quantization(raw, str).method == "mxfp4" and (wanted is None or wanted >= _FP4.bits):
        return FfnLayout(hidden, intermediate, _FP4, _FP4)
    return _layout(hidden, intermediate, bits.matrix_bits("experts", ""))


def _layout(hidden: int, intermediate: int, bits: int) -> FfnLayout:
    return FfnLayout(hidden, intermediate, _tile(bits, hidden), _tile(bits, intermediate))


def _tile(bits: int, cols: int) -> TileCodec:
    return TileCodec(bits, 64 if cols % 64 == 0 else 32)
