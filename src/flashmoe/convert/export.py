"""export(): a bundle back to a Hugging Face checkpoint, dequantised, so that any other engine can check ours.

Written like a bundle, file by file through a journal: killed at any point, the same call goes on, and config.json and
the index, without which nobody takes the directory for a model, come last.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashmoe.bundle.codecs import U8
from flashmoe.bundle.progress import Progress
from flashmoe.bundle.reader import Bundle
from flashmoe.bundle.writer import write_whole
from flashmoe.checkpoint.dtypes import F32, HalfType, f32_to_half, half_to_f32
from flashmoe.convert.export_tensors import ExportTensor, export_tensors
from flashmoe.convert.units import Piece, Unit
from flashmoe.convert.writing import UnitWriter, open_output
from flashmoe.errors import BundleError, ConfigError
from flashmoe.models.fit import check_fit
from flashmoe.models.registry import find_family

DTYPES = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
_TORCH_NAMES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
_COPIED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# Of multi-token prediction, whose layers a bundle leaves out: a reader that is told of them would look for them.
_LEFT_OUT = ("num_nextn_predict_layers", "mtp_num_hidden_layers")
SHARD_NBYTES = 5 * 10**9


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    rounded: tensors that the type does not hold exactly, of those written in this run; largest_error: of a rounded
    value, as a share of the tensor's largest.  resumed: an earlier run had written a part.
    """

    path: Path
    nbytes: int
    dtype: str
    tensors: int
    rounded: int
    largest_error: float
    resumed: bool


def export(
    bundle: Path | str,
    dst: Path | str,
    *,
    dtype: str = "bf16",
    shard_nbytes: int = SHARD_NBYTES,
    progress: Progress | None = None,
) -> ExportReport:
    """Write the bundle's weights as ``dtype`` (bf16, f16 or f32, which is exact) to the directory ``dst``.

    Vectors (norms, decay rates) that ``dtype`` does not hold exactly stay float32.  Memory: some expert or batch of
    rows at a time.  Raises BundleError, ConfigError or ReadError, one line each; dst is then no checkpoint yet.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype} is not offered: choose {', '.join(DTYPES)}")
    source, dst = Bundle.open(bundle), Path(dst)
    family = find_family(source.config)
    check_fit(source, family, family.config(source.config))
    journal = open_output(dst)
    try:
        options = {"export": str(source.path.resolve()), "dtype": dtype, "shard_nbytes": shard_nbytes}
        begun = journal.start is not None
        if not begun:
            journal.begin(options)
        elif {key: (journal.start or {}).get(key) for key in options} != options:
            raise BundleError(
                f"{dst} was begun by another command: repeat that, or delete it to start afresh"
            )
        tensors = list(export_tensors(source, family, DTYPES[dtype]))
        rounding = _Rounding()
        shards = _shards(tensors, shard_nbytes, rounding)
        writer = UnitWriter(dst, journal, [unit for unit, _ in shards], progress)
        writer.check_space(lambda left, _: sum(left.values()), "free some, or choose another directory")
        for unit, _ in shards:
            if not writer.skip_complete(unit):
                writer.write(unit)
        _finish(source, dst, dtype, shards)
        journal.remove()
        return ExportReport(
            dst, writer.total, dtype, len(tensors), len(rounding.tensors), rounding.largest, begun
        )
    except BaseException:
        journal.remove_if_empty()
        raise
    finally:
        journal.close()


class _Rounding:
    """Which tensors were rounded, and by how much at most.  Pieces are made by several threads: adding is atomic."""

    def __init__(self) -> None:
        self.tensors: set[str] = set()
        self._errors: list[float] = [0.0]

    @property
    def largest(self) -> float:
        return max(self._errors)

    def encode(self, name: str, values: F32, dtype: str) -> U8:
        """Little-endian bytes; raises BundleError when a value is beyond the type's range."""
        if dtype == "F32":
            return values.astype("<f4", copy=False).view(np.uint8)
        half: HalfType = "f16" if dtype == "F16" else "bf16"
        raw = f32_to_half(values, half)
        back = half_to_f32(raw, half)
        if not np.isfinite(back).all():
            raise BundleError(f"{name} has values beyond the range of {half}: choose --dtype bf16 or f32")
        if not np.array_equal(back, values):
            self.tensors.add(name)
            self._errors.append(float(np.abs(back - values).max() / np.abs(values).max()))
        return raw.astype("<u2", copy=False).view(np.uint8)


def _shards(
    tensors: Sequence[ExportTensor], most: int, rounding: _Rounding
) -> list[tuple[Unit, list[ExportTensor]]]:
    """Files of at most ``most`` bytes (or one tensor), in order, each with its tensors."""
    groups: list[list[ExportTensor]] = [[]]
    room = most
    for tensor in tensors:
        if groups[-1] and tensor.nbytes > room:
            groups.append([])
            room = most
        groups[-1].append(tensor)
        room -= tensor.nbytes
    names = ["model.safetensors"]
    if len(groups) > 1:
        names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    return [(_unit(name, group, rounding), group) for name, group in zip(names, groups, strict=True)]


def _unit(name: str, tensors: Sequence[ExportTensor], rounding: _Rounding) -> Unit:
    header = _header(tensors)

    def piece(index: int) -> Piece:
        if index == 0:
            return Piece("", len(header), lambda: iter([np.frombuffer(header, np.uint8)]))
        tensor = tensors[index - 1]
        return Piece(tensor.name, tensor.nbytes, lambda: _bytes_of(tensor, rounding))

    total = len(header) + sum(tensor.nbytes for tensor in tensors)
    return Unit(name, name, len(tensors) + 1, total, piece)


def _bytes_of(tensor: ExportTensor, rounding: _Rounding) -> Iterator[U8]:
    for values in tensor.chunks():
        yield rounding.encode(tensor.name, values, tensor.dtype)


def _header(tensors: Sequence[ExportTensor]) -> bytes:
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    offset = 0
    for tensor in tensors:
        span = [offset, offset + tensor.nbytes]
        table[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": span}
        offset += tensor.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    size = -(-len(text) // 8) * 8
    return size.to_bytes(8, "little") + text.ljust(size)


def _finish(
    source: Bundle, dst: Path, dtype: str, shards: Sequence[tuple[Unit, Sequence[ExportTensor]]]
) -> None:
    """The small files; config.json, without which nothing loads the directory, is the last."""
    for name in _COPIED:
        if (source.path / name).exists():
            write_whole(dst / name, (source.path / name).read_bytes())
    if len(shards) > 1:
        weight_map = {tensor.name: unit.file for unit, tensors in shards for tensor in tensors}
        size = sum(tensor.nbytes for _, tensors in shards for tensor in tensors)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        _write_json(dst / "model.safetensors.index.json", index)
    _write_json(dst / "config.json", plain_config(source, dtype))


def plain_config(source: Bundle, dtype: str) -> dict[str, Any]:
    """config.json of the text model alone, without a word of quantisation."""
    config = dict(source.text_config)
    for key in ("quantization", "quantization_config", "torch_dtype", "gguf_architecture"):
        config.pop(key, None)
    config |= {key: 0 for key in _LEFT_OUT if key in config}
    config["dtype"] = _TORCH_NAMES[dtype]
    whole = config.get("architectures")
    if isinstance(whole, list):  # what reads images as well holds the text model as a part
        config["architectures"] = [str(a).replace("ForConditionalGeneration", "ForCausalLM") for a in whole]
    return config


def _write_json(path: Path, value: object) -> None:
    write_whole(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
