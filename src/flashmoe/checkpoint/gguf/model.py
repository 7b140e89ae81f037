"""A model in GGUF: its files, its configuration, and its tensors under the names and in the order of the model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe.checkpoint.gguf.config import Metadata, config_of
from flashmoe.checkpoint.gguf.fused import layers_of_joined_experts, parts
from flashmoe.checkpoint.gguf.header import GgufHeader, read_gguf
from flashmoe.checkpoint.gguf.names import Names, Orders
from flashmoe.checkpoint.gguf.tokenizer import tokenizer_files
from flashmoe.checkpoint.header import Header
from flashmoe.checkpoint.matrices import Matrix
from flashmoe.checkpoint.reordered import reordered
from flashmoe.checkpoint.tensors import TensorRef
from flashmoe.errors import CheckpointError

if TYPE_CHECKING:
    from flashmoe.checkpoint.detect import Tensors

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_MAX_PARTS = 1000


@dataclass(frozen=True)
class GgufModel:
    """``headers`` by file name in their order; ``texts``: small files of a checkpoint directory."""

    config: dict[str, Any]
    headers: dict[str, Header]
    texts: dict[str, bytes]


def find_gguf(path: Path) -> list[Path]:
    """The files of a GGUF model: ``path`` itself with its further parts, or the only model of a directory.

    Empty where ``path`` is something else.  Raises CheckpointError when a part is missing or a directory has several.
    """
    if path.is_file():
        return _parts(path) if path.suffix == ".gguf" else []
    if (
        not path.is_dir()
        or any(path.glob("*.safetensors"))
        or (path / "model.safetensors.index.json").exists()
    ):
        return []
    # mmproj: what turns pictures into embeddings, kept beside the text model.
    names = sorted(file.name for file in path.glob("*.gguf") if "mmproj" not in file.name)
    firsts = [name for name in names if (part := _PART.fullmatch(name)) is None or int(part[2]) == 1]
    if len(firsts) > 1:
        raise CheckpointError(
            f"{path} has {len(firsts)} models ({', '.join(firsts[:3])}, ...): give one of the files"
        )
    return _parts(path / firsts[0]) if firsts else []


def _parts(path: Path) -> list[Path]:
    part = _PART.fullmatch(path.name)
    if part is None:
        return [path]
    count = int(part[3])
    if not 0 < count <= _MAX_PARTS:
        raise CheckpointError(f"{path} claims to be one of {count} files: rename it")
    files = [path.with_name(f"{part[1]}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: download it again (the model has {count} files)")
    return files


def open_gguf(files: list[Path]) -> GgufModel:
    """Read the headers of a model's files; the first has the metadata.  Raises CheckpointError."""
    found: dict[str, GgufHeader] = {file.name: read_gguf(file) for file in files}
    metadata = found[files[0].name].metadata
    tensors = {
        name: TensorRef(entry, file)
        for file in files
        for name, entry in found[file.name].tensors.tensors.items()
    }
    config = config_of(Metadata(files[0], metadata, tensors))
    texts = {"config.json": json.dumps(config, indent=2).encode(), **tokenizer_files(files[0], metadata)}
    return GgufModel(config, {name: header.tensors for name, header in found.items()}, texts)


class GgufView:
    """The tensors of GGUF files as the model's: names, orders, changed values."""

    def __init__(self, config: Mapping[str, Any], originals: Iterable[str]) -> None:
        """``config`` is that of open_gguf(); ``originals``: the tensors of all files by their names there."""
        self._config = config
        interval = config.get("full_attention_interval")
        self._names = Names(
            str(config.get("model_type")),
            int(config.get("num_hidden_layers", 0)),
            interval if type(interval) is int and interval > 0 else 4,
            layers_of_joined_experts(originals),
        )
        self._orders = Orders(config)
        self.canonical, self.vector, self.source = (
            self._names.canonical,
            self._orders.vector,
            self._orders.source,
        )

    def parts(self, name: str, ref: TensorRef) -> list[tuple[str, TensorRef]]:
        """The tensors of the model in the one of canonical name ``name``; raises CheckpointError."""
        return parts(self._config, name, ref)

    def matrix(self, tensors: Tensors, module: str, rows: int, cols: int) -> Matrix:
        """The matrix of ``module``, rows and columns as the model has them; raises like Tensors.matrix."""
        source, factor = self._orders.source(module)
        base = tensors.matrix(source, factor * rows, cols)
        row_of, column_of = self._orders.rows(module, rows), self._orders.columns(module, cols)
        return base if row_of is None and column_of is None else reordered(base, row_of, column_of)
