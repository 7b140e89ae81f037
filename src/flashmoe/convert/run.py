"""convert(): a checkpoint becomes a bundle, file by file, in bounded memory, resumable at any point."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from flashmoe.bundle.codecs import U8
from flashmoe.bundle.manifest import JOURNAL_FILE, MANIFEST_FILE, FileRecord, Manifest
from flashmoe.bundle.progress import Progress
from flashmoe.bundle.writer import write_manifest, write_whole
from flashmoe.checkpoint import Checkpoint, Skipped, read_config
from flashmoe.checkpoint.checkpoint import header_from_json, header_to_json, read_shard
from flashmoe.checkpoint.gguf.model import find_gguf
from flashmoe.convert.bits import Bits, parse_bits
from flashmoe.convert.encode import encode_ffn, encode_tiles
from flashmoe.convert.importance import NO_IMPORTANCE, Importance
from flashmoe.convert.journal import Journal
from flashmoe.convert.plan import (
    FITS,
    ExpertsItem,
    Item,
    MatrixItem,
    Plan,
    VectorItem,
    Wishes,
    make_plan,
    scale_types_from_json,
    scale_types_to_json,
)
from flashmoe.convert.sources import Sources
from flashmoe.convert.units import (
    RESIDENT_KEY,
    Unit,
    experts_units,
    key_of_layer,
    layer_key,
    layer_record,
    resident_unit,
    tensor_records,
)
from flashmoe.convert.writing import Stripes, UnitWriter, open_output
from flashmoe.errors import BundleError, CheckpointError


@dataclass(frozen=True)
class Calibration:
    """What a calibration run found out: the file of importances, and facts on it for the manifest."""

    importance: Path
    facts: Mapping[str, Any]


VERBATIM_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did.  ``unknown`` are tensors that no part of the model asked for."""

    path: Path
    nbytes: int
    lossless: bool
    note: str
    skipped: Sequence[Skipped]
    unknown: Sequence[str]
    deleted_shards: Sequence[Path]
    resumed: bool


def convert(
    src: Path | str,
    dst: Path | str,
    *,
    bits: Bits | str | int | None = None,
    fit: str = FITS[0],
    calibration: Calibration | None = None,
    consume_source: bool = False,
    experts_dirs: Sequence[Path | str] = (),
    progress: Progress | None = None,
) -> ConvertReport:
    """Convert the checkpoint ``src`` (directory or GGUF file) into a bundle at ``dst``; memory stays below about 1 GiB.

    ``bits``: of routed experts ("4"), or by part ("experts=4,attention=8,head=6", see convert/bits.py); None keeps a
    quantised source's own (lossless) and means 4 for floats.  ``fit``: how floats become codes below eight bits,
    "squares" (least squares, weighted where ``calibration`` knows the inputs) or "range".
    Killed at any point, the same call goes on where it stopped and ends with the same bytes.
    ``consume_source`` deletes each shard once all its tensors are durably written: the source is lost, and
    with it the tensors that text generation does not use (vision, multi-token prediction).
    ``experts_dirs`` share the routed experts instead of the bundle keeping them itself: one on each drive.
    Raises CheckpointError, ConfigError, BundleError or ReadError, one line each; dst is then no bundle.
    """
    src, dst = Path(src), Path(dst)
    _check_source(src, dst)
    importance = Importance.open(calibration.importance) if calibration is not None else NO_IMPORTANCE
    wishes = Wishes(parse_bits(bits), fit, importance)
    journal = open_output(dst)
    try:
        stripes = Stripes(dst, [Path(directory) for directory in experts_dirs], journal)
        conversion = _Conversion(src, dst, journal, wishes, calibration, stripes)
        return conversion.run(consume_source, progress)
    except BaseException:
        journal.remove_if_empty()
        raise
    finally:
        journal.close()


def _check_source(src: Path, dst: Path) -> None:
    """Refuse what is no checkpoint, before ``dst`` is created."""
    if src.suffix == ".gguf" and (src.is_file() or (dst / JOURNAL_FILE).exists()):
        return  # a finished file may be gone when a conversion goes on
    if not src.is_dir():
        raise CheckpointError(
            f"{src} is not a directory or GGUF file: give the directory of a downloaded model"
        )
    if (src / MANIFEST_FILE).exists():
        raise CheckpointError(
            f"{src} is a bundle already: run it as it is, or convert the checkpoint it was made from"
        )
    if not find_gguf(src):
        read_config(src)


class _Conversion:
    """One run: its plan, and the files it consists of."""

    def __init__(
        self,
        src: Path,
        dst: Path,
        journal: Journal,
        wishes: Wishes,
        calibration: Calibration | None,
        stripes: Stripes,
    ) -> None:
        self._src, self._dst, self._journal, self._stripes = src, dst, journal, stripes
        self._wishes, self._calibration = wishes, calibration
        self._resumed = journal.start is not None
        self._checkpoint, self._plan = self._resume() if self._resumed else self._begin()
        self._resident = resident_unit(self._plan.resident, self._plan.tied, self._item_bytes)
        stripes.link(self._expert_count)
        self._layers = {
            layer_key(item.layer): _layer_units(item, stripes.links) for item in self._plan.experts
        }

    def run(self, consume: bool, progress: Progress | None) -> ConvertReport:
        sources = Sources(self._checkpoint, self._plan, consume)
        parts = {RESIDENT_KEY: [self._resident]} | {key: self._layers[key] for key in sources.layer_order()}
        writer = UnitWriter(
            self._dst, self._journal, [unit for units in parts.values() for unit in units], progress
        )

        def growth(left: Mapping[str, int], folder: Path) -> int:
            of_layers = Counter[str]()
            for key, nbytes in left.items():
                of_layers[key_of_layer(key)] += nbytes
            return sources.peak_growth(of_layers, folder)

        writer.check_space(growth, "free some, or let --consume-source delete the source as it is converted")
        deleted: list[Path] = []
        for key, units in parts.items():
            for unit in units:
                if not writer.skip_complete(unit):
                    sources.require(key)
                    writer.write(unit)
            deleted += sources.finished(key)
        manifest = self._manifest()
        self._stripes.write_marks(manifest)
        write_manifest(self._dst, manifest)
        self._journal.remove()
        return ConvertReport(
            path=self._dst,
            nbytes=writer.total,
            lossless=self._plan.lossless,
            note=self._plan.note,
            skipped=self._checkpoint.skipped,
            unknown=sources.unknown,
            deleted_shards=deleted,
            resumed=self._resumed,
        )

    def _begin(self) -> tuple[Checkpoint, Plan]:
        checkpoint = Checkpoint.open(self._src)
        plan = make_plan(checkpoint, self._wishes)
        texts = dict(checkpoint.texts or {})
        for name, data in texts.items():  # now, because the file they come from may be deleted before the end
            write_whole(self._dst / name, data)
        self._journal.begin(
            {
                **self._options,
                "config": _config_hash(checkpoint),
                "texts": {name: xxhash.xxh3_64_hexdigest(data) for name, data in texts.items()},
                "shards": {name: checkpoint.fingerprint(name) for name in checkpoint.headers},
                "headers": {name: header_to_json(header) for name, header in checkpoint.headers.items()},
                "scale_types": scale_types_to_json(plan.scale_types),
                **self._stripes.start,
            }
        )
        return checkpoint, plan

    def _resume(self) -> tuple[Checkpoint, Plan]:
        start = self._journal.start or {}
        again = f"give the same source and options to go on, or delete {self._dst} to start afresh"
        if "headers" not in start:
            raise BundleError(
                f"{self._dst} was begun by another command: delete it or choose another directory"
            )
        for key, value in self._options.items():
            if start.get(key) != value:
                raise BundleError(
                    f"{self._dst} was begun with --{key} {start.get(key)}, not {value}: {again}"
                )
        headers = {name: header_from_json(value) for name, value in start["headers"].items()}
        texts = {name: _read_small(self._dst / name) for name in start.get("texts", {})}
        folder = self._src.parent if texts and self._src.suffix == ".gguf" else self._src
        config = json.loads(texts["config.json"]) if texts else read_config(self._src)
        checkpoint = Checkpoint(folder, config, headers, texts or None)
        unchanged = all(
            xxhash.xxh3_64_hexdigest(data) == start["texts"][name] for name, data in texts.items()
        )
        if not unchanged or start["config"] != _config_hash(checkpoint):
            raise BundleError(f"{self._dst} was begun from another source than {self._src}: {again}")
        for name, fingerprint in start["shards"].items():
            if (folder / name).exists() and not _is_same(checkpoint, name, fingerprint):
                raise BundleError(f"{folder / name} has changed since {self._dst} was begun: {again}")
        return checkpoint, make_plan(checkpoint, self._wishes, scale_types_from_json(start["scale_types"]))

    @property
    def _options(self) -> dict[str, Any]:
        """What must be the same for a conversion to go on, by the names of the command's options."""
        wishes = self._wishes
        bits: Any = str(wishes.bits) or None
        if wishes.bits.units:
            bits = {"parts": bits, "units": dict(wishes.bits.units)}
        return {"bits": bits, "fit": wishes.fit, "calibrate": wishes.importance.fingerprint}

    def _item_bytes(self, item: Item) -> Iterator[U8]:
        """The stored bytes of a resident item, in chunks."""
        if isinstance(item, VectorItem):
            values = self._checkpoint.vector(item.spec.source, int(np.prod(item.shape)))
            if item.spec.zero_centred and self._checkpoint.kind == "hf":
                values = values + np.float32(1)
            yield values.astype("<f4").view(np.uint8)
        elif isinstance(item, MatrixItem):
            yield from encode_tiles(item.part, item.form)
        else:
            yield encode_ffn(item.codec, item.parts, item.gate_up, item.down)

    def _manifest(self) -> Manifest:
        plan, checkpoint = self._plan, self._checkpoint
        start = self._journal.start or {}
        pieces, links = self._journal.pieces, self._stripes.links
        return Manifest(
            model_type=plan.model_type,
            source={"name": self._src.resolve().name, "kind": checkpoint.kind, "shards": start["shards"]},
            quantization_note=plan.note,
            lossless=plan.lossless,
            quantization=self._quantization(),
            tensors=tensor_records(self._resident, plan.resident, self._hashes(self._resident.key)),
            expert_count=self._expert_count,
            experts=[layer_record(item.layer, item.layout, pieces, len(links)) for item in plan.experts],
            stripes=tuple(links),
            skipped=[
                {"prefix": s.prefix, "tensors": s.tensors, "nbytes": s.nbytes} for s in checkpoint.skipped
            ],
            files=_copy_verbatim(checkpoint, self._dst),
        )

    def _quantization(self) -> dict[str, Any]:
        """What was asked for; the codecs of the tensors say what became of it."""
        facts: dict[str, Any] = {key: value for key, value in self._options.items() if value is not None}
        if all(form.keep_codes for form, _ in self._plan.forms):
            del facts["fit"]  # nothing was fitted
        return facts if self._calibration is None else facts | {"calibration": dict(self._calibration.facts)}

    @property
    def _expert_count(self) -> int:
        return self._plan.experts[0].count if self._plan.experts else 0

    def _hashes(self, key: str) -> list[str]:
        return [digest for _, digest in self._journal.pieces(key)]


def _layer_units(item: ExpertsItem, stripes: Sequence[str]) -> list[Unit]:
    def record(expert: int) -> U8:
        biases = None if item.biases is None else item.biases(expert)
        return encode_ffn(item.layout, item.parts(expert), item.gate_up, item.down, biases)

    return experts_units(item.layer, item.count, item.layout, record, stripes)


def _copy_verbatim(checkpoint: Checkpoint, dst: Path) -> dict[str, FileRecord]:
    """Copy the small files that the source has; those of a GGUF file were written at the beginning."""
    records = {}
    for name in VERBATIM_FILES:
        if checkpoint.texts is not None:
            data = checkpoint.texts.get(name)
        else:
            data = _read_small(checkpoint.path / name) if (checkpoint.path / name).exists() else None
            if data is not None:
                write_whole(dst / name, data)
        if data is not None:
            records[name] = FileRecord(len(data), xxhash.xxh3_64_hexdigest(data))
    return records


def _is_same(checkpoint: Checkpoint, shard: str, fingerprint: str) -> bool:
    header = read_shard(checkpoint.path / shard)
    return header == checkpoint.headers[shard] and checkpoint.fingerprint(shard) == fingerprint


def _config_hash(checkpoint: Checkpoint) -> str:
    texts = checkpoint.texts
    data = _read_small(checkpoint.path / "config.json") if texts is None else texts["config.json"]
    return xxhash.xxh3_64_hexdigest(data)


def _read_small(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror}; make it readable and run again"
        ) from error
