"""Opening a bundle: every file is found and sized before anything is allocated or read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.bundle.codecs import U8, Codec, DenseCodec, FfnLayout
from flashmoe.bundle.manifest import (
    RESIDENT_FILE,
    TENSOR_ALIGN,
    LayerRecord,
    Manifest,
    TensorRecord,
    load_manifest,
)
from flashmoe.bundle.stripes import find_stripes
from flashmoe.checkpoint.header import TensorEntry, read_header
from flashmoe.checkpoint.pread import read_exact
from flashmoe.errors import BundleError, CheckpointError

_DENSE_NAMES = {"f32": "F32", "bf16": "BF16", "f16": "F16"}
_DENSE_TYPES: dict[str, np.dtype[Any]] = {
    "f32": np.dtype("<f4"),
    "bf16": np.dtype("<u2"),
    "f16": np.dtype("<f2"),
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a resident tensor lies in resident.safetensors.

    rows and cols are the logical size (a vector has cols 1, an FFN record [intermediate, hidden]);
    ``shape`` is the stored array's: tiles [row_tiles, groups, tile_nbytes], values, or [nbytes].
    """

    name: str
    codec: Codec
    rows: int
    cols: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class ExpertLayer:
    """One layer's experts: ``count`` records of ``record_nbytes`` bytes, striped by expert over ``paths``."""

    layer: int
    paths: tuple[Path, ...]
    count: int
    record_nbytes: int
    ffn: FfnLayout

    @property
    def path(self) -> Path:
        """The file of the first stripe, for most bundles the only one."""
        return self.paths[0]

    def place(self, expert: int) -> tuple[int, int]:
        """(which of the paths, offset in bytes) of a record."""
        turn, stripe = divmod(expert, len(self.paths))
        return stripe, turn * self.record_nbytes

    def records(self, stripe: int) -> int:
        """How many records the file of a stripe has."""
        return len(range(stripe, self.count, len(self.paths)))


class Bundle:
    """An opened bundle: names, places and sizes.  Immutable, so safe to share between threads."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        config: dict[str, Any],
        tensors: Mapping[str, TensorInfo],
        experts_dirs: Sequence[Path],
    ) -> None:
        """experts_dirs: the directories of its stripes; of a bundle that is not striped, itself."""
        self.path = path
        self.manifest = manifest
        self.config = config
        self.text_config = flatten_text_config(config)
        self.generation_config = _read_json(path / "generation_config.json", optional=True)
        self.resident_path = path / RESIDENT_FILE
        self.experts_dirs = list(experts_dirs)
        self.expert_layers = [_expert_layer(experts_dirs, manifest, record) for record in manifest.experts]
        self._tensors = tensors

    @classmethod
    def open(cls, path: Path | str, experts_dirs: Sequence[Path] = ()) -> Bundle:
        """Open the bundle in directory ``path``.

        experts_dirs: of a striped bundle, directories that are not where its links say, in any order.
        Raises BundleError (one line) when the manifest is missing, damaged or of another version, or any
        file is absent or not exactly as long as the manifest says.  Reads no weights.
        """
        path = Path(path)
        manifest = load_manifest(path)
        for name, file in manifest.files.items():
            _check_size(path / name, file.nbytes)
        directories = find_stripes(path, manifest, experts_dirs)
        config, tensors = _read_json(path / "config.json"), _resident_tensors(path, manifest)
        bundle = cls(path, manifest, config, tensors, directories)
        for layer in bundle.expert_layers:
            for stripe, path in enumerate(layer.paths):
                _check_size(path, layer.record_nbytes * layer.records(stripe))
        return bundle

    @property
    def model_type(self) -> str:
        """The model family, e.g. ``qwen3_5_moe`` (never the ``_text`` variant)."""
        return self.manifest.model_type

    def tensor_names(self) -> list[str]:
        """Names of all resident tensors, in file order."""
        return list(self._tensors)

    def tensor(self, name: str) -> TensorInfo:
        """Where ``name`` lies; raises BundleError when the bundle has no such tensor."""
        info = self._tensors.get(name)
        if info is None:
            raise BundleError(f"{self.path} has no tensor {name!r}: convert the model again")
        return info

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def read(self, name: str) -> NDArray[Any]:
        """A fresh array of info.shape: u8 tiles or record bytes, or dense values (bf16 as raw uint16).

        Raises ReadError when the file cannot be read to its end.  Thread-safe.
        """
        info = self.tensor(name)
        raw = read_exact(self.resident_path, info.offset, info.nbytes)
        if isinstance(info.codec, DenseCodec):
            return raw.view(_DENSE_TYPES[info.codec.dtype]).reshape(info.shape)
        return raw.reshape(info.shape)

    def read_expert(self, layer: int, expert: int) -> U8:
        """The record u8 [record_nbytes] of an expert, by buffered read.  Thread-safe.

        Raises BundleError when the bundle has no such layer or expert, ReadError when reading fails.
        """
        for entry in self.expert_layers:
            if entry.layer == layer and 0 <= expert < entry.count:
                stripe, offset = entry.place(expert)
                return read_exact(entry.paths[stripe], offset, entry.record_nbytes)
        raise BundleError(f"{self.path} has no expert {expert} in layer {layer}")


def flatten_text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text part of a config.json: the keys of ``text_config`` over those beside it."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        return dict(config)
    outer = {key: value for key, value in config.items() if key not in ("text_config", "vision_config")}
    return {**outer, **text}


def _resident_tensors(path: Path, manifest: Manifest) -> dict[str, TensorInfo]:
    file = path / RESIDENT_FILE
    try:
        header = read_header(file)
    except CheckpointError as error:
        raise BundleError(f"{file} cannot be opened ({error}): convert the model again") from error
    end = max((e.offset + e.nbytes for e in header.tensors.values()), default=header.file_nbytes)
    if end != header.file_nbytes:
        raise BundleError(f"{file} has {header.file_nbytes} bytes, not {end}: convert the model again")
    tensors = {}
    for name, record in manifest.tensors.items():
        entry = header.tensors.get(name)
        if entry is None or entry.shape != record.stored_shape or entry.dtype != _stored_dtype(record):
            raise BundleError(f"{file} and the manifest disagree about {name!r}: convert the model again")
        if entry.offset % TENSOR_ALIGN:  # kernels load whole cache lines, and float arrays are views
            raise BundleError(
                f"{file}: {name!r} is not at a multiple of {TENSOR_ALIGN}: convert the model again"
            )
        tensors[name] = _tensor_info(name, record, entry)
    return dict(sorted(tensors.items(), key=lambda item: item[1].offset))


def _tensor_info(name: str, record: TensorRecord, entry: TensorEntry) -> TensorInfo:
    rows = record.shape[0]
    cols = record.shape[1] if len(record.shape) > 1 else 1
    return TensorInfo(name, record.codec, rows, cols, entry.shape, entry.offset, entry.nbytes)


def _stored_dtype(record: TensorRecord) -> str:
    return _DENSE_NAMES[record.codec.dtype] if isinstance(record.codec, DenseCodec) else "U8"


def _expert_layer(directories: Sequence[Path], manifest: Manifest, record: LayerRecord) -> ExpertLayer:
    paths = tuple(directory / record.file for directory in directories)
    return ExpertLayer(record.layer, paths, manifest.expert_count, record.record_nbytes, record.ffn)


def _check_size(file: Path, nbytes: int) -> None:
    try:
        found = file.stat().st_size
    except OSError as error:
        raise BundleError(f"{file} cannot be opened ({error.strerror}): convert the model again") from error
    if found != nbytes:
        raise BundleError(
            f"{file} has {found} bytes, not {nbytes}: copy the bundle again or convert the model again"
        )


def _read_json(file: Path, optional: bool = False) -> dict[str, Any]:
    if optional and not file.exists():
        return {}
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{file} cannot be read ({error}): copy it from the source model again") from error
    if not isinstance(value, dict):
        raise BundleError(f"{file} is no JSON object: copy it from the source model again")
    return value
