"""A bundle's weights as tensors of the Hugging Face checkpoint they came from: a model's name map, read backwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from flashmoe.bundle.codecs import TILE_ROWS, TileCodec, dequantize_ffn
from flashmoe.bundle.reader import Bundle, TensorInfo
from flashmoe.checkpoint.dtypes import F32, f32_to_half, half_to_f32
from flashmoe.checkpoint.header import DTYPE_NBYTES
from flashmoe.checkpoint.pread import read_exact
from flashmoe.errors import BundleError
from flashmoe.models.registry import ModelFamily
from flashmoe.models.spec import ExpertsSpec, FfnSource, FfnSpec, MatrixSource, MatrixSpec, VectorSpec

_BATCH_VALUES = 1 << 21  # values dequantised at a time: 8 MiB, as in conversion


@dataclass(frozen=True)
class ExportTensor:
    """A tensor to write: its values come in chunks, front to back, each made when it is asked for."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[F32]]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * DTYPE_NBYTES[self.dtype]


def export_tensors(bundle: Bundle, family: ModelFamily, dtype: str) -> Iterator[ExportTensor]:
    """All tensors of the model, resident ones first, in ``dtype`` ("BF16", "F16", "F32").

    Raises BundleError where the name map does not say how a tensor of the source is put together.
    """
    spec = family.spec(family.config(bundle.config))
    pieces: dict[str, list[tuple[MatrixSource, Callable[[], Iterator[F32]]]]] = {}
    for item in spec.resident:
        if isinstance(item, VectorSpec):
            yield _vector(bundle, item, dtype)
        elif isinstance(item, MatrixSpec):
            pieces.setdefault(item.source.module, []).append((item.source, _rows(bundle, item.name)))
        else:
            for source, part in zip(_sources(item.source), range(3), strict=True):
                pieces.setdefault(source.module, []).append((source, _record_part(bundle, item, part)))
    for module, found in pieces.items():
        source = found[0][0]
        chunks = found[0][1] if _is_whole(source) else _assembled(bundle, module, found)
        yield ExportTensor(_name(f"{module}.weight"), dtype, (source.rows, source.cols), chunks)
    for layer in spec.experts:
        yield from _experts(bundle, layer, dtype)


def _vector(bundle: Bundle, spec: VectorSpec, dtype: str) -> ExportTensor:
    values = bundle.read(spec.name).astype(np.float32).reshape(spec.shape)
    if spec.zero_centred:
        values = values - np.float32(1)
    if dtype != "F32":
        half = "f16" if dtype == "F16" else "bf16"
        exact = np.array_equal(half_to_f32(f32_to_half(values, half), half), values)  # type: ignore[arg-type]
        dtype = dtype if exact else "F32"
    # A convolution over time is [channels, 1, taps] for torch.
    shape = (spec.shape[0], 1, *spec.shape[1:]) if spec.source.endswith("conv1d.weight") else spec.shape
    return ExportTensor(_name(spec.source), dtype, shape, lambda: iter([values.reshape(-1)]))


def _rows(bundle: Bundle, name: str) -> Callable[[], Iterator[F32]]:
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


def _record_part(bundle: Bundle, spec: FfnSpec, part: int) -> Callable[[], Iterator[F32]]:
    def chunks() -> Iterator[F32]:
        layout = bundle.tensor(spec.name).codec
        yield dequantize_ffn(layout, bundle.read(spec.name))[part]  # type: ignore[arg-type]

    return chunks


def _assembled(
    bundle: Bundle, module: str, found: Sequence[tuple[MatrixSource, Callable[[], Iterator[F32]]]]
) -> Callable[[], Iterator[F32]]:
    """Several matrices of the bundle, of rows of one matrix of the source."""
    rows = found[0][0].rows
    picked = sum(source.picked_rows for source, _ in found)
    if picked != rows:
        raise BundleError(f"{bundle.path} holds {picked} of {rows} rows of {module}: it cannot be exported")

    def chunks() -> Iterator[F32]:
        whole = np.empty((rows, found[0][0].cols), np.float32)
        for source, part in found:
            values, at = np.concatenate(list(part())), 0
            for first, count in source.runs:
                whole[first : first + count] = values[at : at + count]
                at += count
        yield whole

    return chunks


def _experts(bundle: Bundle, spec: ExpertsSpec, dtype: str) -> Iterator[ExportTensor]:
    """Stacked where the family stacks them, else three tensors for each expert."""
    form = spec.forms[0]
    layout = next(layer.ffn for layer in bundle.expert_layers if layer.layer == spec.layer)

    def parts(expert: int) -> tuple[F32, F32, F32]:
        return dequantize_ffn(layout, bundle.read_expert(spec.layer, expert))

    first = form(0)
    if first.gate.rows == spec.intermediate:
        for expert in range(spec.count):
            for i, source in enumerate(_sources(form(expert))):
                chunks = _of_expert(parts, expert, (i,))
                yield ExportTensor(
                    _name(f"{source.module}.weight"), dtype, (source.rows, source.cols), chunks
                )
        return
    if first.gate.module != first.up.module or not _is_pair(form, spec):
        raise BundleError(
            f"{bundle.path}: {first.gate.module} is stored in a way that cannot be exported yet"
        )
    for source, picked in ((first.gate, (0, 1)), (first.down, (2,))):
        shape = (spec.count, source.rows // spec.count, source.cols)
        yield ExportTensor(_name(source.module), dtype, shape, _of_all(parts, spec.count, picked))


def _is_pair(form: Callable[[int], FfnSource], spec: ExpertsSpec) -> bool:
    """True when each expert's rows are its gate and then its up, one expert after the other."""
    size = spec.intermediate
    return all(
        (form(e).gate.runs, form(e).up.runs, form(e).down.runs)
        == (((2 * e * size, size),), (((2 * e + 1) * size, size),), ((e * spec.hidden, spec.hidden),))
        for e in (0, spec.count - 1)
    )


Parts = Callable[[int], tuple[F32, F32, F32]]


def _of_expert(parts: Parts, expert: int, picked: Sequence[int]) -> Callable[[], Iterator[F32]]:
    def chunks() -> Iterator[F32]:
        found = parts(expert)
        for i in picked:
            yield found[i]

    return chunks


def _of_all(parts: Parts, count: int, picked: Sequence[int]) -> Callable[[], Iterator[F32]]:
    def chunks() -> Iterator[F32]:
        for expert in range(count):
            yield from _of_expert(parts, expert, picked)()

    return chunks


def _sources(source: FfnSource) -> tuple[MatrixSource, MatrixSource, MatrixSource]:
    return source.gate, source.up, source.down


def _is_whole(source: MatrixSource) -> bool:
    return source.runs == ((0, source.rows),)


def _name(canonical: str) -> str:
    """As transformers names a causal language model's tensors."""
    return canonical if canonical.startswith("lm_head") else f"model.{canonical}"
