"""From rows of a checkpoint matrix to codes in the form the bundle stores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from flashmoe.bundle.codecs import (
    TILE_BITS,
    TILE_ROWS,
    U8,
    FfnBiases,
    FfnLayout,
    Quantized,
    TileCodec,
    pack_ffn,
)
from flashmoe.checkpoint import CodedMatrix, Matrix, Run
from flashmoe.checkpoint.dtypes import F32, U16, HalfType, f32_to_half, half_to_f32, is_exact
from flashmoe.convert.biases import Biases
from flashmoe.convert.fit import fit
from flashmoe.convert.importance import no_importance
from flashmoe.convert.quantize import quantize
from flashmoe.errors import CheckpointError

_TABLE_BITS = 4
_BATCH_VALUES = 1 << 21  # values in flight: 8 MiB as float32, about 40 MiB with every temporary


@dataclass(frozen=True)
class Part:
    """Rows of a checkpoint matrix that become one matrix of the bundle."""

    matrix: Matrix
    runs: tuple[Run, ...]
    importance: Callable[[], F32 | None] = no_importance  # mean squares of the input [cols], read when needed

    @property
    def bits(self) -> int | None:
        """Bits of the source's codes, None where only its values are to be had."""
        return self.matrix.bits if isinstance(self.matrix, CodedMatrix) else None

    @property
    def table(self) -> tuple[int, ...] | None:
        """What four-bit codes of the source stand for, None where they have no such table."""
        return self.matrix.table if isinstance(self.matrix, CodedMatrix) else None

    @property
    def rounded(self) -> bool:
        """True when the codes can be kept, their scales not wholly."""
        return isinstance(self.matrix, CodedMatrix) and self.matrix.rounded


@dataclass(frozen=True)
class Form:
    """How parts are stored: the tile, and whether the source's codes are kept or, by `fit`, made anew.

    fit: "squares" (convert/fit.py) or "range" (convert/quantize.py).
    """

    codec: TileCodec
    keep_codes: bool
    fit: str = "squares"


def encode(part: Part, form: Form) -> Quantized:
    """The whole part as codes; memory is the codes plus one batch."""
    blocks = list(_encode_batches(part, form))
    if len(blocks) == 1:
        return blocks[0]
    return Quantized(*(np.concatenate(arrays) for arrays in zip(*blocks, strict=True)))


def encode_tiles(part: Part, form: Form) -> Iterator[U8]:
    """The part as tiles, a batch of whole row tiles at a time."""
    for block in _encode_batches(part, form):
        yield form.codec.pack(*block)


def encode_ffn(
    layout: FfnLayout, parts: Sequence[Part], gate_up: Form, down: Form, biases: Biases | None = None
) -> U8:
    """The record u8 [layout.nbytes] of gate, up and down parts, and of their biases where it has them."""
    gate, up, out = parts
    values = None if biases is None else FfnBiases(*(bias.read() for bias in biases))
    return pack_ffn(layout, encode(gate, gate_up), encode(up, gate_up), encode(out, down), values)


def choose_form(
    parts: Sequence[Part], wanted: int | None, default: int, scale_type: HalfType, fit: str = "squares"
) -> Form:
    """One form for parts that must share a codec.

    Codes of at most ``wanted`` bits (any, when None) are kept, widened to the next tile where needed; those that all
    have one table of values keep it.  All else is quantised with bf16 scales to ``wanted`` bits, or those that suit its
    values, which are ``default`` for floats.
    """
    tables = {part.table for part in parts}
    if len(tables) == 1 and None not in tables and (wanted is None or wanted >= _TABLE_BITS):
        return Form(TileCodec(_TABLE_BITS, _kept_group(parts), scale_type, *tables), keep_codes=True)
    sources = [part.bits for part in parts]
    widest = max((bits for bits in sources if bits is not None), default=0)
    if None not in sources and (wanted is None or widest <= wanted):
        native = min(bits for bits in TILE_BITS if bits >= widest)
        return Form(TileCodec(wanted or native, _kept_group(parts), scale_type), keep_codes=True)
    fits = [part.matrix.fit for part in parts]
    suited = max(found[0] if found else default for found in fits)
    return Form(TileCodec(wanted or suited, _fitted_group(parts)), keep_codes=False, fit=fit)


def needs_scan(parts: Sequence[Part]) -> bool:
    """True when the scales' type cannot be kept as it is: float32, or not the same everywhere."""
    types = {part.matrix.scale_type for part in parts if isinstance(part.matrix, CodedMatrix)}
    return "F32" in types or len(types) > 1


def plain_scale_type(parts: Sequence[Part]) -> HalfType:
    """The type of 16-bit scales that all affine parts share."""
    return (
        "f16"
        if any(isinstance(p.matrix, CodedMatrix) and p.matrix.scale_type == "F16" for p in parts)
        else "bf16"
    )


def scan_scale_type(parts: Sequence[Part]) -> tuple[HalfType, bool]:
    """bf16 if it holds every scale and bias exactly, else f16 if that does, else the closer one with false: rounded."""
    fits: dict[HalfType, bool] = {"bf16": True, "f16": True}
    errors: dict[HalfType, float] = {"bf16": 0.0, "f16": 0.0}
    for part in parts:
        if isinstance(part.matrix, CodedMatrix):
            for batch in split_runs(part.runs, _batch_rows(part.matrix.cols)):
                values = np.stack(part.matrix.read_scales(batch))
                fits = {dtype: fits[dtype] and is_exact(values, dtype) for dtype in fits}
                errors = {dtype: errors[dtype] + _squared_error(values, dtype) for dtype in errors}
    for dtype in fits:
        if fits[dtype]:
            return dtype, True
    return min(errors, key=errors.__getitem__), False


def _squared_error(values: F32, dtype: HalfType) -> float:
    """What rounding costs; infinite where a value is beyond the type's range."""
    with np.errstate(over="ignore"):
        difference = half_to_f32(f32_to_half(values, dtype), dtype).astype(np.float64) - values
        return float(np.square(difference).sum())


def split_runs(runs: Sequence[Run], batch: int) -> Iterator[list[Run]]:
    """The same rows in the same order in lists of exactly ``batch`` rows (the last may be shorter)."""
    current: list[Run] = []
    room = batch
    for start, count in runs:
        while count:
            take = min(count, room)
            current.append((start, take))
            start, count, room = start + take, count - take, room - take
            if not room:
                yield current
                current, room = [], batch
    if current:
        yield current


def _encode_batches(part: Part, form: Form) -> Iterator[Quantized]:
    for batch in split_runs(part.runs, _batch_rows(part.matrix.cols)):
        if form.keep_codes and isinstance(part.matrix, CodedMatrix):
            yield _keep(part.matrix, batch, form.codec)
        else:
            yield _make(part, part.matrix.read_values(batch), form)


def _make(part: Part, values: F32, form: Form) -> Quantized:
    bits, group = form.codec.bits, form.codec.group
    with np.errstate(over="ignore", invalid="ignore"):  # near the end of float32, which is refused below
        if form.fit == "range" or bits == 8:  # at eight bits the range loses nothing that could be measured
            made = quantize(values, bits, group)
        else:
            made = fit(values, bits, group, part.importance())
    if not all(np.isfinite(half_to_f32(raw, "bf16")).all() for raw in (made.scales, made.biases)):
        raise CheckpointError(
            f"{part.matrix.where} has values of which no scale is finite: no real model does, download it again"
        )
    return made


def _keep(matrix: CodedMatrix, runs: Sequence[Run], codec: TileCodec) -> Quantized:
    rows = matrix.read(runs) if codec.table is None else matrix.read_entries(runs)
    repeats = matrix.group // codec.group  # a group of 128 becomes two of 64 with the same scale
    scales, biases = (
        np.repeat(_halves(matrix, values, codec.scale_dtype), repeats, axis=1)
        for values in (rows.scales, rows.biases)
    )
    return Quantized(rows.codes, scales, biases)


def _halves(matrix: CodedMatrix, values: F32, dtype: HalfType) -> U16:
    raw = f32_to_half(values, dtype)
    if not np.isfinite(half_to_f32(raw, dtype)).all():
        raise CheckpointError(
            f"{matrix.where} has scales beyond the range of {dtype}: no real model does, download it again"
        )
    return raw


def _batch_rows(cols: int) -> int:
    return max(TILE_ROWS, _BATCH_VALUES // cols // TILE_ROWS * TILE_ROWS)


def _kept_group(parts: Sequence[Part]) -> int:
    coded = [part.matrix for part in parts if isinstance(part.matrix, CodedMatrix)]
    return 64 if all(matrix.group % 64 == 0 for matrix in coded) else 32


def _fitted_group(parts: Sequence[Part]) -> int:
    """64 columns where they divide the matrix and suit it, else 32 (the rest of a down matrix is padded)."""
    widest = min((fit[1] for part in parts if (fit := part.matrix.fit)), default=64)
    return 64 if widest >= 64 and all(part.matrix.cols % 64 == 0 for part in parts) else 32
