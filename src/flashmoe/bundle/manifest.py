"""manifest.json: what a bundle holds, checked field by field when it is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from flashmoe.bundle.codecs import (
    RECORD_ALIGN,
    Codec,
    DenseCodec,
    FfnLayout,
    TileCodec,
    codec_from_json,
    codec_to_json,
    ffn_from_json,
    is_extended,
)
from flashmoe.errors import BundleError

FORMAT = "flashmoe-bundle"
FORMAT_VERSION = 1
STRIPED_VERSION = 2  # of a bundle whose experts lie in several directories: older readers must refuse it
EXTENDED_VERSION = 3  # with tables of codes, biased records or other GLUs; striped or not
MOST_STRIPES = 64
MANIFEST_FILE = "manifest.json"
RESIDENT_FILE = "resident.safetensors"
TENSOR_ALIGN = 64  # in resident.safetensors; a cache line, so that tiles never straddle one needlessly
EXPERTS_FOLDER = "experts"
JOURNAL_FILE = "convert.journal"  # of a bundle in the making; gone when it is whole
_MAX_DIM = 1 << 31


@dataclass(frozen=True)
class TensorRecord:
    """One resident tensor: its codec, its logical shape ([rows, cols] or [n]) and its checksum."""

    codec: Codec
    shape: tuple[int, ...]
    xxh3: str

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The array shape in resident.safetensors: tiles, values, or the bytes of an FFN record."""
        return stored_shape(self.codec, self.shape)


@dataclass(frozen=True)
class LayerRecord:
    """The experts file of one layer; record e starts at e * record_nbytes.

    With S stripes, record e is in the `file` of stripe e % S, at e // S * record_nbytes.
    """

    layer: int
    file: str
    record_nbytes: int
    ffn: FfnLayout
    xxh3: tuple[str, ...]


@dataclass(frozen=True)
class FileRecord:
    """A file copied verbatim from the source."""

    nbytes: int
    xxh3: str


@dataclass(frozen=True)
class Manifest:
    """The whole manifest.json; ``experts`` is ordered by layer and may be empty.

    quantization: for people, what the conversion was asked for.

    stripes: directories of the bundle (links, mostly) that share the experts; none: each layer is one file.
    """

    model_type: str
    source: Mapping[str, Any]
    quantization_note: str
    lossless: bool
    tensors: Mapping[str, TensorRecord]
    expert_count: int
    experts: Sequence[LayerRecord]
    skipped: Sequence[Mapping[str, Any]] = ()
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    stripes: Sequence[str] = ()
    quantization: Mapping[str, Any] = field(default_factory=dict)

    @property
    def format_version(self) -> int:
        """The lowest version that has all that the bundle uses, so that older readers open what they can."""
        codecs = [*(tensor.codec for tensor in self.tensors.values()), *(layer.ffn for layer in self.experts)]
        if any(map(is_extended, codecs)):
            return EXTENDED_VERSION
        return STRIPED_VERSION if self.stripes else FORMAT_VERSION

    @property
    def experts_identity(self) -> str:
        """What tells one model's experts from another's, wherever and in how many stripes they lie."""
        digest = xxhash.xxh3_128(self.model_type.encode())
        for record in self.experts:
            digest.update(f"/{record.layer}:{','.join(record.xxh3)}".encode())
        return digest.hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The JSON object of manifest.json."""
        experts = {"count": self.expert_count, "layers": [_layer_to_json(r) for r in self.experts]}
        return {
            "format": FORMAT,
            "format_version": self.format_version,
            "model_type": self.model_type,
            "source": dict(self.source),
            "quantization_note": self.quantization_note,
            "lossless": self.lossless,
            **({"quantization": dict(self.quantization)} if self.quantization else {}),
            "files": {name: {"nbytes": f.nbytes, "xxh3": f.xxh3} for name, f in self.files.items()},
            "tensors": {name: _tensor_to_json(tensor) for name, tensor in self.tensors.items()},
            "experts": experts | {"stripes": list(self.stripes)} if self.stripes else experts,
            "skipped": [dict(item) for item in self.skipped],
        }


def stored_shape(codec: Codec, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The array shape of a tensor in resident.safetensors, given its logical one."""
    if isinstance(codec, TileCodec):
        rows, cols = shape
        return codec.matrix_shape(rows, cols)
    return (codec.nbytes,) if isinstance(codec, FfnLayout) else shape


def load_manifest(folder: Path) -> Manifest:
    """Read folder/manifest.json.

    Raises BundleError (one line) when it is missing, no JSON, of another format version or inconsistent.
    """
    path = folder / MANIFEST_FILE
    try:
        text = path.read_bytes()
    except OSError as error:
        if (folder / JOURNAL_FILE).exists():
            raise BundleError(
                f"{folder} is not a flashmoe bundle yet, its conversion was interrupted or is still running:"
                " run the same `flashmoe convert` command again to finish it"
            ) from error
        raise BundleError(
            f"{folder} is not a flashmoe bundle ({MANIFEST_FILE}: {error.strerror}):"
            " make one with `flashmoe convert SOURCE BUNDLE`"
        ) from error
    try:
        return parse_manifest(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is no JSON ({error}): convert the model again") from error
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from error


def parse_manifest(value: object) -> Manifest:
    """Check the JSON value of a manifest; raises BundleError that does not name the file."""
    root = _object(value, "the manifest")
    if root.get("format") != FORMAT:
        raise BundleError(f"format is {root.get('format')!r}, not {FORMAT!r}: this is no flashmoe bundle")
    version = root.get("format_version")
    if version not in (FORMAT_VERSION, STRIPED_VERSION, EXTENDED_VERSION):
        raise BundleError(
            f"format_version is {version!r}, this flashmoe reads {FORMAT_VERSION} to {EXTENDED_VERSION}:"
            " convert the model again or use another flashmoe"
        )
    experts = _object(root.get("experts"), "experts")
    count = _size(experts, "count", "experts", least=0)
    layers = [_layer_from_json(item, count) for item in _list(experts.get("layers"), "experts.layers")]
    numbers = [layer.layer for layer in layers]
    if numbers != sorted(set(numbers)):
        raise BundleError("experts.layers is not in ascending order: convert the model again")
    striped = version == STRIPED_VERSION or (version == EXTENDED_VERSION and "stripes" in experts)
    stripes = _stripes(experts, count, layers) if striped else ()
    return Manifest(
        model_type=_text(root, "model_type", "the manifest"),
        source=_object(root.get("source"), "source"),
        quantization_note=_text(root, "quantization_note", "the manifest"),
        lossless=root.get("lossless") is True,
        quantization=_object(root.get("quantization", {}), "quantization"),
        tensors={n: _tensor_from_json(n, v) for n, v in _object(root.get("tensors"), "tensors").items()},
        expert_count=count,
        experts=layers,
        skipped=[_skipped(item) for item in _list(root.get("skipped"), "skipped")],
        files={n: _file_from_json(n, v) for n, v in _object(root.get("files", {}), "files").items()},
        stripes=stripes,
    )


def _stripes(experts: dict[str, Any], count: int, layers: Sequence[LayerRecord]) -> tuple[str, ...]:
    """The directories of a striped bundle: none without an expert, no two files of a directory the same."""
    stripes = tuple(_list(experts.get("stripes"), "experts.stripes"))
    if not 1 <= len(stripes) <= min(count, MOST_STRIPES) or len(set(map(str, stripes))) != len(stripes):
        raise BundleError(
            f"experts.stripes names {len(stripes)} directories for {count} experts: stripe the bundle again"
        )
    for name in stripes:
        if not isinstance(name, str) or not _is_inside(name):
            raise BundleError(f"experts.stripes names {name!r}, outside the bundle: stripe the bundle again")
    if len({layer.file for layer in layers}) != len(layers):
        raise BundleError("two layers of experts.layers share a file: convert the model again")
    return stripes


def _tensor_to_json(tensor: TensorRecord) -> dict[str, Any]:
    body: dict[str, Any] = {"codec": codec_to_json(tensor.codec)}
    if isinstance(tensor.codec, DenseCodec):
        body["shape"] = list(tensor.shape)
    else:
        body["rows"], body["cols"] = tensor.shape
    return {**body, "xxh3": tensor.xxh3}


def _tensor_from_json(name: str, value: object) -> TensorRecord:
    body = _object(value, name)
    codec = codec_from_json(body.get("codec"))
    if isinstance(codec, DenseCodec):
        shape = tuple(_list(body.get("shape"), f"{name}.shape"))
        if not shape or any(type(n) is not int or not 0 < n < _MAX_DIM for n in shape):
            raise BundleError(f"tensors.{name}.shape is {list(shape)!r}: convert the model again")
    else:
        shape = _size(body, "rows", name), _size(body, "cols", name)
    if isinstance(codec, FfnLayout) and shape != (codec.intermediate, codec.hidden):
        raise BundleError(f"tensors.{name} is {shape}, not [intermediate, hidden]: convert the model again")
    record = TensorRecord(codec, shape, _hash(body.get("xxh3"), name))
    record.stored_shape  # noqa: B018  raises when cols is no multiple of the group
    return record


def _layer_to_json(record: LayerRecord) -> dict[str, Any]:
    ffn = codec_to_json(record.ffn)
    return {
        "layer": record.layer,
        "file": record.file,
        "record_nbytes": record.record_nbytes,
        "ffn": ffn,
        "xxh3": list(record.xxh3),
    }


def _layer_from_json(value: object, count: int) -> LayerRecord:
    body = _object(value, "experts.layers")
    layer = _size(body, "layer", "experts.layers", least=0)
    where = f"experts layer {layer}"
    file = _text(body, "file", where)
    if not _is_inside(file):
        raise BundleError(f"{where} names the file {file!r}, outside the bundle: convert the model again")
    ffn = ffn_from_json(body.get("ffn"))
    record_nbytes = _size(body, "record_nbytes", where)
    if record_nbytes < ffn.nbytes or record_nbytes % RECORD_ALIGN:
        raise BundleError(
            f"{where} has records of {record_nbytes} bytes for {ffn.nbytes}: convert the model again"
        )
    hashes = tuple(_hash(item, where) for item in _list(body.get("xxh3"), f"{where}.xxh3"))
    if len(hashes) != count:
        raise BundleError(f"{where} has {len(hashes)} checksums for {count} experts: convert the model again")
    return LayerRecord(layer, file, record_nbytes, ffn, hashes)


def _file_from_json(name: str, value: object) -> FileRecord:
    body = _object(value, f"files.{name}")
    if "/" in name or not _is_inside(name):
        raise BundleError(f"files names {name!r}, outside the bundle: convert the model again")
    return FileRecord(_size(body, "nbytes", f"files.{name}", least=0), _hash(body.get("xxh3"), name))


def _is_inside(name: str) -> bool:
    """A path that stays in the bundle, in characters that every file system takes (no NUL, no half surrogate)."""
    parts = Path(name).parts
    return bool(parts) and name.isprintable() and not {"..", "/"} & set(parts) and "\\" not in name


def _skipped(value: object) -> dict[str, Any]:
    body = _object(value, "skipped")
    counts = {key: _size(body, key, "skipped", least=0, most=1 << 62) for key in ("tensors", "nbytes")}
    return {**body, "prefix": _text(body, "prefix", "skipped"), **counts}


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BundleError(f"{where} is no JSON object: convert the model again")
    return value


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise BundleError(f"{where} is no JSON list: convert the model again")
    return value


def _text(body: dict[str, Any], key: str, where: str) -> str:
    value = body.get(key)
    if not isinstance(value, str):
        raise BundleError(f"{key} of {where} is {value!r}, no string: convert the model again")
    return value


def _size(body: dict[str, Any], key: str, where: str, least: int = 1, most: int = _MAX_DIM - 1) -> int:
    value = body.get(key)
    if type(value) is not int or not least <= value <= most:
        raise BundleError(f"{key} of {where} is {value!r}, no sensible number: convert the model again")
    return value


def _hash(value: object, where: str) -> str:
    if not isinstance(value, str) or len(value) != 16 or set(value) - set("0123456789abcdef"):
        raise BundleError(f"the checksum {value!r} of {where} is no 16 hex digits: convert the model again")
    return value
