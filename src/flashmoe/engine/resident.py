"""Resident weights: read once into one arena, handed out by name, bound to the backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from flashmoe.bundle.codecs import U8, DenseCodec, FfnLayout
from flashmoe.bundle.reader import Bundle, TensorInfo
from flashmoe.errors import BundleError, ReadError
from flashmoe.kernels.cpu import CpuOps, FfnWeights
from flashmoe.store.reader import AlignedBuffer, ExpertReader

_ALIGN = 4096


def streamed_embedding(bundle: Bundle) -> bool:
    """True when the embedding can stay on the drive: it is not also the output head."""
    return "lm_head" in bundle


def resident_range(bundle: Bundle, embedding: bool = False) -> tuple[int, int]:
    """(first, end) of the bytes of resident.safetensors that are read into memory, first 4 KiB aligned.

    embedding: also an embedding that could stay on the drive.
    """
    infos = [bundle.tensor(name) for name in bundle.tensor_names()]
    if streamed_embedding(bundle) and not embedding:
        infos = [info for info in infos if info.name != "embed_tokens"]
    first = min(info.offset for info in infos) // _ALIGN * _ALIGN
    return first, max(info.offset + info.nbytes for info in infos)


class ResidentWeights:
    """Implements nn.weights.Weights over one arena.  Immutable once loaded."""

    def __init__(
        self,
        bundle: Bundle,
        ops: CpuOps,
        reader: ExpertReader,
        file_index: int,
        embedding: bool = False,
        verify: bool = False,
    ) -> None:
        """Reads the weights.  Raises ReadError when the file cannot be read to its end.

        verify: also when a tensor is not what its checksum says.
        """
        self._bundle, self._ops = bundle, ops
        self.handles: dict[int, str] = {}  # id() of a matrix, or a record's address -> name
        self._first, end = resident_range(bundle, embedding)
        self._buffer = AlignedBuffer(-(-(end - self._first) // _ALIGN) * _ALIGN, True)
        self._bytes: U8 = self._buffer.array()
        reader.read_into(file_index, self._first, end - self._first, self._buffer, 0)
        if verify:
            self._verify(end)

    @property
    def data(self) -> U8:
        """All bytes of the arena."""
        return self._bytes

    def matrix(self, name: str, rows: int, cols: int, bias: bool = False) -> Any:
        """The matrix (with its bias) in the backend's form; raises BundleError when a shape differs."""
        info = self._checked(name, (rows, cols))
        if isinstance(info.codec, FfnLayout):
            raise BundleError(
                f"{self._bundle.path}: {name} is a feed-forward record, not a matrix: convert again"
            )
        added = self.vector(f"{name}.bias", rows) if bias else None
        handle = self._ops.weight(self._raw(info), info.codec, rows, cols, added)
        self.handles[id(handle)] = name
        return handle

    def vector(self, name: str, *shape: int) -> NDArray[np.float32]:
        """A float32 array of `shape`; raises BundleError when the bundle has another one."""
        info = self._checked(name, shape if len(shape) > 1 else (shape[0], 1))
        if info.codec != DenseCodec("f32"):
            raise BundleError(f"{self._bundle.path}: {name} is not stored as f32: convert the model again")
        return self._raw(info).view(np.float32).reshape(shape)

    def ffn(self, name: str, hidden: int, intermediate: int) -> FfnWeights:
        """A feed-forward record; raises BundleError when its sizes differ."""
        info = self._bundle.tensor(name)
        layout = info.codec
        if not isinstance(layout, FfnLayout) or (layout.hidden, layout.intermediate) != (
            hidden,
            intermediate,
        ):
            raise BundleError(
                f"{self._bundle.path}: {name} is no {hidden} x {intermediate} record: convert again"
            )
        record = self._ops.ffn_weights(self._raw(info), layout)
        self.handles[record.address] = name
        return record

    def _verify(self, end: int) -> None:
        for name, record in self._bundle.manifest.tensors.items():
            info = self._bundle.tensor(name)
            held = self._first <= info.offset and info.offset + info.nbytes <= end
            if held and xxhash.xxh3_64_hexdigest(self._raw(info).data) != record.xxh3:
                raise ReadError(
                    f"{self._bundle.resident_path}: tensor {name!r} at byte {info.offset}: the checksum does not "
                    "match: run `flashmoe verify` on the bundle"
                )

    def _checked(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        info = self._bundle.tensor(name)
        if (info.rows, info.cols) != shape:
            raise BundleError(
                f"{self._bundle.path}: {name} is {info.rows} x {info.cols}, config.json wants {shape}: convert again"
            )
        return info

    def _raw(self, info: TensorInfo) -> U8:
        start = info.offset - self._first
        return self._bytes[start : start + info.nbytes]
