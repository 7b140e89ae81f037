"""Token embeddings: from resident tiles when tied to the output head, else row tile by row tile from the drive."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from flashmoe.bundle.codecs import TILE_ROWS, DenseCodec, FfnLayout, TileCodec
from flashmoe.bundle.reader import Bundle, TensorInfo
from flashmoe.engine.resident import ResidentWeights, streamed_embedding
from flashmoe.errors import BundleError
from flashmoe.kernels.cpu import CpuOps
from flashmoe.nn.weights import F32, I32
from flashmoe.store.reader import AlignedBuffer, ExpertReader

_ALIGN = 4096
# Distinct row tiles fetched together; 256 of a 4,096-wide model are 9 MiB.
_BATCH = 256


def make_embedding(
    bundle: Bundle,
    weights: ResidentWeights,
    ops: CpuOps,
    reader: ExpertReader,
    file_index: int,
    resident: bool = False,
) -> Callable[[I32, F32], None]:
    """A function (ids [tokens], out [tokens, hidden]) -> None.

    resident: `weights` holds the embedding though it could stay on the drive.
    """
    info = bundle.tensor("embed_tokens")
    if streamed_embedding(bundle) and not resident:
        return StreamedEmbedding(info, ops, reader, file_index)
    table = weights.matrix("embed_tokens", info.rows, info.cols)
    return lambda ids, out: ops.embed(table, ids, out)


def streamed_nbytes(bundle: Bundle) -> int:
    """Memory that a streamed embedding needs; 0 when it must be resident."""
    if not streamed_embedding(bundle):
        return 0
    return _BATCH * _window(*_unit(bundle.tensor("embed_tokens")))


def table_nbytes(bundle: Bundle) -> int:
    """Bytes of the table that a streamed embedding leaves on the drive; 0 when it must be resident."""
    return bundle.tensor("embed_tokens").nbytes if streamed_embedding(bundle) else 0


class StreamedEmbedding:
    """Reads only the rows that a step needs.  Not thread-safe.

    A unit is what holds one token's row: a row tile of 16 rows (18 KiB at hidden 2,048 and 4 bit), or one row of
    an unquantised table.
    """

    def __init__(self, info: TensorInfo, ops: CpuOps, reader: ExpertReader, file_index: int) -> None:
        self._info, self._ops, self._reader, self._file = info, ops, reader, file_index
        self._unit_nbytes, self._unit_rows = _unit(info)
        self._stride = _window(self._unit_nbytes, self._unit_rows)
        self._buffer = AlignedBuffer(_BATCH * self._stride, False)
        self._bytes = self._buffer.array()

    def __call__(self, ids: I32, out: F32) -> None:
        """out[t] = row ids[t].  Raises ReadError when the file cannot be read."""
        units, inverse = np.unique(ids // self._unit_rows, return_inverse=True)
        for start in range(0, len(units), _BATCH):
            self._reader.read_many(self._reads(units[start : start + _BATCH]))
            for t in np.flatnonzero((inverse >= start) & (inverse < start + _BATCH)):
                self._copy_row(int(inverse[t]) - start, int(ids[t]), out[t : t + 1])

    def _reads(self, units: I32) -> list[tuple[int, int, int, AlignedBuffer, int]]:
        reads = []
        for slot, unit in enumerate(units.tolist()):
            begin = self._info.offset + unit * self._unit_nbytes
            aligned = begin // _ALIGN * _ALIGN
            end = min(
                -(-(begin + self._unit_nbytes) // _ALIGN) * _ALIGN, self._info.offset + self._info.nbytes
            )
            reads.append((self._file, aligned, end - aligned, self._buffer, slot * self._stride))
        return reads

    def _copy_row(self, slot: int, token: int, out: F32) -> None:
        unit, row = divmod(token, self._unit_rows)
        start = slot * self._stride + (self._info.offset + unit * self._unit_nbytes) % _ALIGN
        data = self._bytes[start : start + self._unit_nbytes]
        assert not isinstance(self._info.codec, FfnLayout)
        table = self._ops.weight(data, self._info.codec, self._unit_rows, self._info.cols)
        self._ops.embed(table, np.array([row], np.int32), out)


def _unit(info: TensorInfo) -> tuple[int, int]:
    """(bytes, rows) of the smallest piece that holds a whole row."""
    if isinstance(info.codec, TileCodec):
        return info.codec.matrix_nbytes(TILE_ROWS, info.cols), TILE_ROWS
    if isinstance(info.codec, DenseCodec):
        return info.cols * info.codec.itemsize, 1
    raise BundleError("embed_tokens is stored as a feed-forward record: convert the model again")


def _window(unit_nbytes: int, _rows: int) -> int:
    """Aligned room for a unit that starts anywhere in a block."""
    return (-(-unit_nbytes // _ALIGN) + 1) * _ALIGN
