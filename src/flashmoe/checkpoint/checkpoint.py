"""A checkpoint directory under canonical names, whoever wrote it."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from flashmoe.checkpoint.detect import Tensors
from flashmoe.checkpoint.dtypes import F32
from flashmoe.checkpoint.gguf.header import read_gguf
from flashmoe.checkpoint.gguf.model import GgufView, find_gguf, open_gguf
from flashmoe.checkpoint.header import Header, TensorEntry, read_header
from flashmoe.checkpoint.matrices import Matrix
from flashmoe.checkpoint.pread import read_exact
from flashmoe.checkpoint.quantization import read_quantization
from flashmoe.checkpoint.tensors import FLOAT_TYPES, TensorRef, raw_to_f32
from flashmoe.errors import CheckpointError

# What stands before the text model's names: multimodal Hugging Face, MLX, text-only Hugging Face.
_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")
# Parts of multimodal and multi-token-prediction checkpoints that text generation does not use.
_SKIPPED = ("mtp.", "visual.", "vision_tower.")
# What quantisers write beside the weights and no reader of these needs: shapes, scales of activations.
_SKIPPED_ENDS = (
    ".weight_shape", ".input_scale", ".input_global_scale", ".input_zero_point", ".k_scale", ".v_scale",
)  # fmt: skip
_SAMPLE = 4096  # bytes of each content sample of a fingerprint
_SAMPLES = 16


@dataclass(frozen=True)
class Skipped:
    """Tensors under ``prefix`` (as the checkpoint spells it) that are known and not needed."""

    prefix: str
    tensors: int
    nbytes: int


class Checkpoint:
    """The tensors of a checkpoint by canonical name (``layers.0.mlp.gate.weight``).  Immutable."""

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        headers: Mapping[str, Header],
        texts: Mapping[str, bytes] | None = None,
    ) -> None:
        """``path``: the directory of the shards; ``texts``: small files that stand in the weights' own metadata."""
        self.path = path
        self.config = config
        self.texts = texts
        self.headers = dict(headers)  # shard file name -> header, in file order
        self.tensors: dict[str, TensorRef] = {}
        self.skipped: list[Skipped] = []
        self._gguf: GgufView | None = None
        if any(name.endswith(".gguf") for name in self.headers):
            self._gguf = GgufView(config, [name for header in headers.values() for name in header.tensors])
        self._collect()
        self.kind: Literal["hf", "mlx", "gguf"] = "gguf" if self._gguf else self._detect_kind()
        quantization = read_quantization(config, lambda key: canonical_name(key)[0])
        self._forms = Tensors(str(path), self.tensors, quantization)

    @classmethod
    def open(cls, path: Path | str) -> Checkpoint:
        """Open a directory with config.json and safetensors files (sharded or not), or a model in GGUF.

        A GGUF model is a file, the first of several (``-00001-of-00003``), or a directory that has no other model.
        Raises CheckpointError (one line) when a file is missing or damaged, a shard of the index is absent, a
        tensor appears in two shards, or the weights are quantised in a way flashmoe does not read.
        """
        path = Path(path)
        files = find_gguf(path)
        if files:
            model = open_gguf(files)
            return cls(files[0].parent, model.config, model.headers, model.texts)
        config = read_config(path)
        return cls(path, config, {name: read_header(path / name) for name in _shard_names(path)})

    def vector(self, name: str, count: int) -> F32:
        """float32 [count] of a small float tensor; raises CheckpointError when missing or of another size."""
        ref = self.ref(name)
        if ref.entry.dtype not in FLOAT_TYPES:
            raise CheckpointError(
                f"{ref.where} has the type {ref.entry.dtype}, not one of {', '.join(FLOAT_TYPES)}"
            )
        if ref.entry.nbytes != count * {"F32": 4}.get(ref.entry.dtype, 2):
            raise CheckpointError(
                f"{ref.where} is {list(ref.entry.shape)}, {count} values wanted: check config.json"
            )
        values: F32 = raw_to_f32(
            read_exact(ref.shard, ref.entry.offset, ref.entry.nbytes)[None], ref.entry.dtype
        )[0]
        if self._gguf is not None:
            values = self._gguf.vector(name, values)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{ref.where} holds NaN or infinity: download it again")
        return values

    def has(self, module: str) -> bool:
        """True when the matrix ``module`` exists in some form."""
        return self._forms.has(module if self._gguf is None else self._gguf.source(module)[0])

    def matrix(self, module: str, rows: int, cols: int) -> Matrix:
        """The matrix of ``module`` with leading dimensions flattened to ``rows``.

        Raises CheckpointError when it is missing, of another size, or quantised in an unknown way.
        """
        if self._gguf is not None:
            return self._gguf.matrix(self._forms, module, rows, cols)
        return self._forms.matrix(module, rows, cols)

    def ref(self, name: str) -> TensorRef:
        """The tensor of a canonical name; raises CheckpointError when it is missing."""
        return self._forms.ref(name)

    def fingerprint(self, shard: str) -> str:
        """16 hex digits over a shard's name, header and 16 samples of its data; any copy of it agrees."""
        header = self.headers[shard]
        digest = xxhash.xxh3_64(shard.encode())
        for entry in header.tensors.values():
            digest.update(repr((entry.name, entry.dtype, entry.shape, entry.offset)).encode())
        size = header.file_nbytes
        for i in range(_SAMPLES):
            offset = max(0, size - _SAMPLE) * i // (_SAMPLES - 1)
            digest.update(read_exact(self.path / shard, offset, min(_SAMPLE, size)).data)
        return digest.hexdigest()

    def skip(self, prefixes: Iterable[str]) -> None:
        """Leave out tensors whose canonical names begin so: known ones that the model does without."""
        for prefix in prefixes:
            names = [name for name in self.tensors if name.startswith(prefix)]
            sizes = [self.tensors.pop(name).entry.nbytes for name in names]
            if sizes:
                self.skipped.append(Skipped(prefix, len(sizes), sum(sizes)))

    def unused(self, used: Iterable[str]) -> list[str]:
        """Canonical names that ``used`` leaves over, sorted."""
        return sorted(set(self.tensors) - set(used))

    def _collect(self) -> None:
        skipped: dict[str, list[int]] = {}
        for shard, header in self.headers.items():
            for entry in header.tensors.values():
                name, prefix = (self._gguf.canonical if self._gguf else canonical_name)(entry.name)
                if prefix is not None:
                    skipped.setdefault(prefix, []).append(entry.nbytes)
                    continue
                ref = TensorRef(entry, self.path / shard)
                for part, part_ref in self._gguf.parts(name, ref) if self._gguf else [(name, ref)]:
                    if part in self.tensors:
                        raise CheckpointError(f"{ref.where} is also {self.tensors[part].where}: keep one")
                    self.tensors[part] = part_ref
        self.skipped = [Skipped(prefix, len(sizes), sum(sizes)) for prefix, sizes in sorted(skipped.items())]

    def _detect_kind(self) -> Literal["hf", "mlx"]:
        """MLX stores the convolution [C, K, 1] and, in the same pass, the norms as 1 + w."""
        for name, ref in self.tensors.items():
            if name.endswith("conv1d.weight") and len(ref.entry.shape) == 3:
                return "mlx" if ref.entry.shape[-1] == 1 else "hf"
        return "mlx" if any(h.metadata.get("format") == "mlx" for h in self.headers.values()) else "hf"


def canonical_name(original: str) -> tuple[str, str | None]:
    """The name without the checkpoint's prefix, and the skipped prefix it falls under, if any."""
    name = original
    for prefix in _PREFIXES:
        if original.startswith(prefix):
            name = original[len(prefix) :]
            break
    for part in _SKIPPED:
        if name.startswith(part):
            return name, original[: len(original) - len(name)] + part
    for end in _SKIPPED_ENDS:
        if name.endswith(end):
            return name, f"*{end}"
    return name, None


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of a directory; raises CheckpointError when it is missing or no JSON object."""
    file = path / "config.json"
    try:
        config = json.loads(file.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"cannot read {file}: {error.strerror}; give a model directory that has it"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is no JSON ({error}): download it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is no JSON object: download it again")
    return config


def read_shard(path: Path) -> Header:
    """The header of a safetensors or GGUF file; raises CheckpointError."""
    return read_gguf(path).tensors if path.suffix == ".gguf" else read_header(path)


def header_to_json(header: Header) -> dict[str, Any]:
    """A header as JSON, so that a checkpoint can be planned after a shard is gone."""
    rows = [[e.name, e.dtype, list(e.shape), e.offset, e.nbytes] for e in header.tensors.values()]
    return {"tensors": rows, "metadata": header.metadata, "file_nbytes": header.file_nbytes}


def header_from_json(value: Any) -> Header:
    """The inverse of header_to_json (our own output: not checked)."""
    entries = [
        TensorEntry(n, dtype, tuple(shape), offset, nbytes)
        for n, dtype, shape, offset, nbytes in value["tensors"]
    ]
    return Header({e.name: e for e in entries}, value["metadata"], value["file_nbytes"])


def _shard_names(path: Path) -> list[str]:
    index = path / "model.safetensors.index.json"
    if not index.exists():
        names = sorted(file.name for file in path.glob("*.safetensors"))
        if not names:
            raise CheckpointError(
                f"{path} has no .safetensors file: give the directory of a downloaded model"
            )
        return names
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} cannot be read ({type(error).__name__}: {error}): download it again"
        ) from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
            raise CheckpointError(
                f"{index} names the shard {reprlib.repr(name)}, outside its folder: download it again"
            )
        # Path.exists would raise for a name longer than the file system allows.
        if not os.path.exists(path / name):
            raise CheckpointError(
                f"{path / name} is missing: download it again (the index names {len(names)} files)"
            )
    return names
