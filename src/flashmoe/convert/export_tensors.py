"""A bundle's weights as tensors of the Hugging Face checkpoint they came from: a model's name map, read backwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from flashmoe.bundle.codecs import TILE_ROWS, TileCodec, dequantize_ffn, unpack_biases
from flashmoe.bundle.reader import Bundle, TensorInfo
from flashmoe.checkpoint.dtypes import F32, HalfType, f32_to_half, half_to_f32
from flashmoe.checkpoint.header import DTYPE_NBYTES
from flashmoe.checkpoint.pread import read_exact
from flashmoe.convert.views import put_rows
from flashmoe.errors import BundleError
from flashmoe.models.registry import ModelFamily
from flashmoe.models.spec import (
    BiasSource,
    ExpertsSpec,
    FfnSource,
    FfnSpec,
    MatrixSource,
    MatrixSpec,
    VectorSpec,
)

_BATCH_VALUES = 1 << 21  # values dequantised at a time: 8 MiB, as in conversion

Chunks = Callable[[], Iterator[F32]]


@dataclass(frozen=True)
class ExportTensor:
    """A tensor to write: its values come in chunks, front to back, each made when it is asked for."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Chunks

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * DTYPE_NBYTES[self.dtype]


def export_tensors(bundle: Bundle, family: ModelFamily, dtype: str) -> Iterator[ExportTensor]:
    """All tensors of the model, resident ones first, in ``dtype`` ("BF16", "F16", "F32").

    Raises BundleError where a tensor of the source has parts that the bundle does not hold.
    """
    spec = family.spec(family.config(bundle.config))
    pieces: dict[str, list[tuple[MatrixSource, Chunks]]] = {}
    for item in spec.resident:
        if isinstance(item, VectorSpec):
            yield _vector(bundle, item, dtype)
        elif isinstance(item, MatrixSpec):
            pieces.setdefault(item.source.module, []).append((item.source, _rows(bundle, item.name)))
        else:
            for part, source in enumerate(_sources(item.source)):
                pieces.setdefault(source.module, []).append((source, _record_part(bundle, item, part)))
    for module, found in pieces.items():
        whole = found[0][0]
        chunks = found[0][1] if _is_whole(whole) else _assembled(bundle, module, found)
        yield ExportTensor(_name(f"{module}.weight"), dtype, whole.stored, chunks)
    for layer in spec.experts:
        yield from _LayerExperts(bundle, layer).tensors(dtype)


def _vector(bundle: Bundle, spec: VectorSpec, dtype: str) -> ExportTensor:
    values = bundle.read(spec.name).astype(np.float32).reshape(spec.shape)
    if spec.zero_centred:
        values = values - np.float32(1)
    # A convolution over time is [channels, 1, taps] for torch.
    shape = (spec.shape[0], 1, *spec.shape[1:]) if spec.source.endswith("conv1d.weight") else spec.shape
    return _held_exactly(spec.source, dtype, values.reshape(shape))


def _rows(bundle: Bundle, name: str) -> Chunks:
    """The rows of a tile matrix, some row tiles at a time."""
    info = bundle.tensor(name)
    codec = info.codec
    assert isinstance(codec, TileCodec), name

    def chunks() -> Iterator[F32]:
        step = max(TILE_ROWS, _BATCH_VALUES // info.cols // TILE_ROWS * TILE_ROWS)
        for begin in range(0, info.rows, step):
            yield _some_rows(bundle, info, codec, begin, min(step, info.rows - begin))

    return chunks


def _some_rows(bundle: Bundle, info: TensorInfo, codec: TileCodec, begin: int, rows: int) -> F32:
    """Rows from ``begin``, the first of a row tile."""
    strip = info.shape[1] * info.shape[2]  # bytes of a row tile
    offset = info.offset + begin // TILE_ROWS * strip
    raw = read_exact(bundle.resident_path, offset, codec.row_tiles(rows) * strip)
    return codec.dequantize(raw, rows, info.cols)


def _record_part(bundle: Bundle, spec: FfnSpec, part: int) -> Chunks:
    def chunks() -> Iterator[F32]:
        layout = bundle.tensor(spec.name).codec
        yield dequantize_ffn(layout, bundle.read(spec.name))[part]  # type: ignore[arg-type]

    return chunks


def _assembled(bundle: Bundle, module: str, found: Sequence[tuple[MatrixSource, Chunks]]) -> Chunks:
    """Several matrices of the bundle, of one matrix of the source."""
    rows, cols = found[0][0].stored
    _check_whole(bundle, module, [source for source, _ in found], rows * cols)

    def chunks() -> Iterator[F32]:
        whole = np.empty((rows, cols), np.float32)
        for source, part in found:
            _put(whole, source, np.concatenate(list(part())))
        yield whole

    return chunks


def _put(whole: F32, source: MatrixSource, values: F32, first: int = 0) -> None:
    """Write the rows that ``source`` picks; ``first``: the row of its matrix that ``whole`` begins with."""
    rows = np.concatenate([np.arange(start, start + count) for start, count in source.runs]) - first
    order = source.order
    put_rows(whole, rows, values, order.turned if order else 0, order.woven if order else 0)


def _check_whole(bundle: Bundle, module: str, sources: Sequence[MatrixSource], values: int) -> None:
    held = sum(source.picked_rows * source.cols for source in sources)
    if held != values:
        raise BundleError(f"{bundle.path} holds {held} of {values} values of {module}: it cannot be exported")


class _LayerExperts:
    """The experts of a layer in the form of published checkpoints."""

    def __init__(self, bundle: Bundle, spec: ExpertsSpec) -> None:
        self._bundle, self._spec = bundle, spec
        self._layout = next(entry.ffn for entry in bundle.expert_layers if entry.layer == spec.layer)

    def tensors(self, dtype: str) -> Iterator[ExportTensor]:
        """Stacked ones where the form has all experts in one tensor, else those of one expert after another."""
        first, second = (_sources(self._spec.published(e)) for e in (0, 1))
        if first[0].module == second[0].module:
            yield from self._stacked(dtype)
        else:
            for expert in range(self._spec.count):
                for part, source in enumerate(_sources(self._spec.published(expert))):
                    chunks = self._single(expert, part)
                    yield ExportTensor(_name(f"{source.module}.weight"), dtype, source.stored, chunks)
        if self._spec.biased:
            yield from self._biases(dtype)

    def _parts(self, expert: int) -> tuple[F32, F32, F32]:
        return dequantize_ffn(self._layout, self._bundle.read_expert(self._spec.layer, expert))

    def _single(self, expert: int, part: int) -> Chunks:
        return lambda: iter([self._parts(expert)[part]])

    def _stacked(self, dtype: str) -> Iterator[ExportTensor]:
        """[experts, rows, cols] of each module of the form."""
        modules = {source.module: source.stored for source in _sources(self._spec.published(0))}
        count = self._spec.count
        for module, (rows, cols) in modules.items():
            mine = [s for s in _sources(self._spec.published(0)) if s.module == module]
            _check_whole(self._bundle, module, mine, rows // count * cols)
            chunks = self._blocks(module, (rows // count, cols))
            yield ExportTensor(_name(module), dtype, (count, rows // count, cols), chunks)

    def _blocks(self, module: str, shape: tuple[int, int]) -> Chunks:
        """A block of ``shape`` for each expert."""

        def chunks() -> Iterator[F32]:
            for expert in range(self._spec.count):
                block = np.empty(shape, np.float32)
                sources = _sources(self._spec.published(expert))
                for source, values in zip(sources, self._parts(expert), strict=True):
                    if source.module == module:
                        _put(block, source, values, expert * (source.rows // self._spec.count))
                yield block

        return chunks

    def _biases(self, dtype: str) -> Iterator[ExportTensor]:
        """[experts, cols] of each tensor that biases come from."""
        for tensor, shape in {s.tensor: (s.rows, s.cols) for s in self._bias_sources(0)}.items():
            yield ExportTensor(_name(tensor), dtype, shape, self._bias_rows(tensor, shape[1]))

    def _bias_rows(self, tensor: str, cols: int) -> Chunks:
        """A row for each expert."""

        def chunks() -> Iterator[F32]:
            for expert in range(self._spec.count):
                row = np.empty(cols, np.float32)
                found = unpack_biases(self._layout, self._bundle.read_expert(self._spec.layer, expert))
                for source, part in zip(self._bias_sources(expert), found, strict=True):
                    if source.tensor == tensor:
                        row[source.first :: source.step] = part
                yield row

        return chunks

    def _bias_sources(self, expert: int) -> tuple[BiasSource, BiasSource, BiasSource]:
        biases = self._spec.published(expert).biases
        assert biases is not None  # the specification says so
        return biases


def _held_exactly(source: str, dtype: str, values: F32) -> ExportTensor:
    """Values that are not rounded: float32 where ``dtype`` does not hold them."""
    if dtype != "F32":
        half: HalfType = "f16" if dtype == "F16" else "bf16"
        dtype = dtype if np.array_equal(half_to_f32(f32_to_half(values, half), half), values) else "F32"
    return ExportTensor(_name(source), dtype, values.shape, lambda: iter([values.reshape(-1)]))


def _sources(source: FfnSource) -> tuple[MatrixSource, MatrixSource, MatrixSource]:
    return source.gate, source.up, source.down


def _is_whole(source: MatrixSource) -> bool:
    return source.order is None and source.runs == ((0, source.rows),)


def _name(canonical: str) -> str:
    """As transformers names a causal language model's tensors."""
    return canonical if canonical.startswith("lm_head") else f"model.{canonical}"
