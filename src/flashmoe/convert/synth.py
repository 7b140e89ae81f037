"""synth(): random weights in the exact shape of a real model, to measure speed without a download."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from flashmoe.bundle.codecs import TILE_ROWS, U8, FfnLayout, TileCodec
from flashmoe.bundle.manifest import FileRecord, Manifest
from flashmoe.bundle.progress import Progress
from flashmoe.bundle.writer import write_manifest, write_whole
from flashmoe.checkpoint.dtypes import F32
from flashmoe.convert.bits import Bits, parse_bits
from flashmoe.convert.journal import Journal
from flashmoe.convert.outline import Outline, Slot, make_outline
from flashmoe.convert.synth_text import (
    BYTE_IDS,
    CHAT_TEMPLATE,
    GENERATION_CONFIG,
    TOKENIZER_CONFIG,
    TOKENS,
    tokenizer_json,
)
from flashmoe.convert.synth_weights import TilePool, router_tiles, vector_values
from flashmoe.convert.units import Unit, experts_units, layer_record, resident_unit, tensor_records
from flashmoe.convert.writing import Stripes, UnitWriter, open_output
from flashmoe.errors import BundleError, ConfigError
from flashmoe.models.registry import find_family

_POOL_NBYTES = 32 << 20


@dataclass(frozen=True)
class SynthReport:
    """What synth wrote: the bundle, its bytes, and how many layers it has."""

    path: Path
    nbytes: int
    layers: int


def synth(
    config_json: Path | str,
    dst: Path | str,
    *,
    layers: int | None = None,
    bits: Bits | str | int = 4,
    router_skew: float = 0.0,
    seed: int = 0,
    experts_dirs: Sequence[Path | str] = (),
    progress: Progress | None = None,
) -> SynthReport:
    """Write a bundle of random weights shaped by a real config.json; the same arguments give the same bytes.

    ``layers`` keeps only that many leading layers; ``bits`` as for convert() of floats.  With ``router_skew``
    S the r-th favourite expert of a layer is chosen about min(0.45, c * r**-S) of the time (0: evenly).  The
    tokenizer knows single bytes only.
    ``experts_dirs`` share the routed experts, as for convert().
    Raises ConfigError or BundleError, one line each.
    """
    config_json, dst = Path(config_json), Path(dst)
    raw = _read_config(config_json)
    if not 0 <= router_skew <= 4:
        raise ConfigError(f"--router-skew {router_skew} is out of range: choose 0 (even) to 4 (nearly fixed)")
    raw = raw if layers is None else _with_layers(raw, layers)
    make_outline(raw, parse_bits(bits))  # every complaint about the config comes before dst is created
    journal = open_output(dst)
    try:
        options = {"synth": raw, "bits": str(parse_bits(bits)), "router_skew": router_skew, "seed": seed}
        stripes = Stripes(dst, [Path(directory) for directory in experts_dirs], journal)
        return _Synthesis(raw, dst, journal, options, stripes).run(config_json.name, progress)
    except BaseException:
        journal.remove_if_empty()
        raise
    finally:
        journal.close()


class _Synthesis:
    def __init__(
        self, raw: dict[str, Any], dst: Path, journal: Journal, options: dict[str, Any], stripes: Stripes
    ) -> None:
        self._raw, self._dst, self._journal, self._stripes = raw, dst, journal, stripes
        self._skew, self._seed = float(options["router_skew"]), int(options["seed"])
        self._begin(options)
        self._family = find_family(raw)
        self._config = self._family.config(raw)
        self._outline: Outline = make_outline(raw, parse_bits(options["bits"]))
        self._pools: dict[tuple[TileCodec, float], TilePool] = {}
        # Far larger than a record, so that the records of a layer differ; small for tiny models.
        record = self._outline.ffn.record_nbytes if self._outline.ffn else 0
        self._pool_nbytes = min(_POOL_NBYTES, max(1 << 20, 64 * record))

    def run(self, source: str, progress: Progress | None) -> SynthReport:
        outline = self._outline
        self._stripes.link(self._config.num_experts)
        resident = resident_unit(outline.resident, outline.tied, self._slot_bytes)
        layers = [] if outline.ffn is None else self._layer_units(outline.expert_layers, outline.ffn)
        units = [resident, *(unit for parts in layers for unit in parts)]
        writer = UnitWriter(self._dst, self._journal, units, progress)
        writer.check_space(lambda left, _: sum(left.values()), "free some, or ask for fewer --layers")
        for unit in units:
            if not writer.skip_complete(unit):
                writer.write(unit)
        manifest = self._manifest(source, resident)
        self._stripes.write_marks(manifest)
        write_manifest(self._dst, manifest)
        self._journal.remove()
        return SynthReport(self._dst, writer.total, self._config.num_hidden_layers)

    def _begin(self, options: dict[str, Any]) -> None:
        start = self._journal.start
        if start is None:
            self._journal.begin(options | self._stripes.start)
        elif {key: start.get(key) for key in options} != options:
            raise BundleError(
                f"{self._dst} was begun with other options: repeat those to go on,"
                " or delete it to start afresh"
            )

    def _slot_bytes(self, slot: Slot) -> Iterator[U8]:
        if isinstance(slot.codec, FfnLayout):
            yield self._record(slot.codec, self._where(slot.name))
        elif not isinstance(slot.codec, TileCodec):
            rng = np.random.default_rng(self._where(slot.name))
            yield vector_values(slot.name, slot.shape, rng).astype("<f4").reshape(-1).view(np.uint8)
        elif slot.name.endswith(".mlp.gate"):
            config, rng = self._config, np.random.default_rng(self._where(slot.name))
            yield router_tiles(slot.codec, slot.shape, config.num_experts_per_tok, self._skew, rng)
        else:
            yield from self._matrix(slot.name, slot.codec, slot.shape)

    def _matrix(self, name: str, codec: TileCodec, shape: tuple[int, ...]) -> Iterator[U8]:
        rows, cols = shape
        row_tiles, groups, _ = codec.matrix_shape(rows, cols)
        fan_in = 1.0 if name == "embed_tokens" else float(cols)
        loud = 0
        if name == ("embed_tokens" if self._outline.tied else "lm_head"):
            # The tokenizer knows the first ids only: sixteen times the logits, so that text appears.
            loud = min(row_tiles, BYTE_IDS // TILE_ROWS)
            yield from self._pool(codec, fan_in / 256).tiles(loud * groups, self._where(name))
        yield from self._pool(codec, fan_in).tiles((row_tiles - loud) * groups, self._where(name))

    def _layer_units(self, layers: Sequence[int], layout: FfnLayout) -> list[list[Unit]]:
        return [self._layer_unit(layer, layout) for layer in layers]

    def _layer_unit(self, layer: int, layout: FfnLayout) -> list[Unit]:
        def record(expert: int) -> U8:
            return self._record(layout, self._where(f"{layer}.{expert}"))

        return experts_units(layer, self._config.num_experts, layout, record, self._stripes.links)

    def _record(self, layout: FfnLayout, where: int) -> U8:
        """Tiles are interchangeable here, so gate and up need no interleaving."""
        record = np.empty(layout.nbytes, np.uint8)
        parts = (
            (record[: layout.down_offset], layout.gate_up, float(layout.hidden), where & 0xFFFFFFFF),
            (
                record[layout.down_offset : layout.bias_offset],
                layout.down,
                float(layout.intermediate),
                where >> 32,
            ),
        )
        for out, codec, fan_in, place in parts:
            start = 0
            for chunk in self._pool(codec, fan_in).tiles(len(out) // codec.tile_nbytes, place):
                out[start : start + chunk.size] = chunk.reshape(-1)
                start += chunk.size
        if layout.biased:
            record[layout.bias_offset :] = _biases(layout, np.random.default_rng(where)).view(np.uint8)
        return record

    def _pool(self, codec: TileCodec, fan_in: float) -> TilePool:
        key = codec, fan_in
        if key not in self._pools:
            self._pools[key] = self._new_pool(codec, fan_in)
        return self._pools[key]

    def _new_pool(self, codec: TileCodec, fan_in: float) -> TilePool:
        rng = np.random.default_rng(self._where(f"{codec.bits} {codec.group} {fan_in}"))
        return TilePool(codec, fan_in, self._pool_nbytes, rng)

    def _where(self, name: str) -> int:
        """A number that depends on nothing but the seed and the name."""
        return xxhash.xxh3_64_intdigest(f"{self._seed} {name}".encode())

    def _manifest(self, source: str, resident: Unit) -> Manifest:
        outline, pieces = self._outline, self._journal.pieces
        note = "random weights: for measuring speed, the text means nothing"
        return Manifest(
            model_type=self._family.model_type,
            source={"name": source, "kind": "synth", "seed": self._seed, "router_skew": self._skew},
            quantization_note=note,
            lossless=False,
            tensors=tensor_records(resident, outline.resident, [h for _, h in pieces(resident.key)]),
            expert_count=self._config.num_experts,
            experts=[
                layer_record(layer, outline.ffn, pieces, len(self._stripes.links))
                for layer in outline.expert_layers
                if outline.ffn is not None
            ],
            files=self._write_text_files(),
            stripes=tuple(self._stripes.links),
        )

    def _write_text_files(self) -> dict[str, FileRecord]:
        if self._config.vocab_size < len(TOKENS):
            raise ConfigError(f"config.json: vocab_size is {self._config.vocab_size}, needs {len(TOKENS)}")
        files = {
            "config.json": json.dumps(self._raw, indent=2),
            "generation_config.json": json.dumps(GENERATION_CONFIG, indent=2),
            "tokenizer.json": tokenizer_json(),
            "tokenizer_config.json": json.dumps(TOKENIZER_CONFIG, indent=2),
            "chat_template.jinja": CHAT_TEMPLATE,
        }
        records = {}
        for name, text in files.items():
            data = text.encode()
            write_whole(self._dst / name, data)
            records[name] = FileRecord(len(data), xxhash.xxh3_64_hexdigest(data))
        return records


def _biases(layout: FfnLayout, rng: np.random.Generator) -> F32:
    """Small biases of gate, up and down, zero where a matrix has no row."""
    out = np.zeros(sum(layout.bias_rows), "<f4")
    start = 0
    for rows, room in zip(
        (layout.intermediate, layout.intermediate, layout.hidden), layout.bias_rows, strict=True
    ):
        out[start : start + rows] = rng.normal(0.0, 0.05, rows)
        start += room
    return out


def _with_layers(raw: dict[str, Any], layers: int) -> dict[str, Any]:
    """The config cut to its first ``layers`` layers."""
    raw = copy.deepcopy(raw)
    text = raw["text_config"] if isinstance(raw.get("text_config"), dict) else raw
    have = text.get("num_hidden_layers")
    if type(have) is not int or not 1 <= layers <= have:
        raise ConfigError(
            f"--layers {layers} is out of range: the model has {have} layers, choose 1 to {have}"
        )
    text["num_hidden_layers"] = layers
    if isinstance(text.get("layer_types"), list):
        text["layer_types"] = text["layer_types"][:layers]
    return raw


def _read_config(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read {path} ({error}): give the config.json of a model") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} is no JSON object: give the config.json of a model")
    return raw
