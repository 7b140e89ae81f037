"""The files of a bundle as sequences of pieces, each made only when its turn comes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from flashmoe.bundle.codecs import U8, Codec, DenseCodec, FfnLayout
from flashmoe.bundle.manifest import EXPERTS_FOLDER, RESIDENT_FILE, LayerRecord, TensorRecord, stored_shape
from flashmoe.bundle.writer import Entry, resident_layout


class Slot(Protocol):
    """A resident tensor to be: what decides its place."""

    @property
    def name(self) -> str:
        """The bundle's name."""

    @property
    def codec(self) -> Codec:
        """How it is stored."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape, as the manifest states it."""


S = TypeVar("S", bound=Slot)


@dataclass(frozen=True)
class Piece:
    """A byte range of a file: its name, size, and how to make its bytes (in chunks)."""

    name: str
    nbytes: int
    make: Callable[[], Iterator[U8]]


@dataclass(frozen=True)
class Unit:
    """A file of the bundle: back-to-back pieces; ``piece(i)`` for i below ``count``."""

    key: str
    file: str
    count: int
    nbytes: int
    piece: Callable[[int], Piece]


RESIDENT_KEY = "resident"


def layer_key(layer: int) -> str:
    """The key of a layer's experts file."""
    return f"layer-{layer}"


def resident_unit(slots: Sequence[S], tied: bool, make: Callable[[S], Iterator[U8]]) -> Unit:
    """resident.safetensors: its header, then tensors and pads; ``make`` makes a tensor's bytes."""
    layout = resident_layout([_entry(slot) for slot in slots], None if tied else "embed_tokens")
    by_name = {slot.name: slot for slot in slots}

    def piece(index: int) -> Piece:
        if index == 0:
            header = np.frombuffer(layout.header, np.uint8)
            return Piece("", len(layout.header), lambda: iter([header]))
        entry = layout.entries[index - 1]
        slot = by_name.get(entry.name)
        if slot is None:
            return Piece(entry.name, entry.nbytes, lambda: iter([np.zeros(entry.nbytes, np.uint8)]))
        return Piece(entry.name, entry.nbytes, lambda: make(slot))

    return Unit(RESIDENT_KEY, RESIDENT_FILE, len(layout.entries) + 1, layout.nbytes, piece)


def experts_units(
    layer: int, count: int, layout: FfnLayout, make: Callable[[int], U8], stripes: Sequence[str] = ()
) -> list[Unit]:
    """A layer's experts: one file, or one in each of the stripes (docs/format.md, section 8)."""
    if not stripes:
        return [_experts_unit(layer_key(layer), _experts_file(layer), range(count), layout, make)]
    name = Path(_experts_file(layer)).name
    return [
        _experts_unit(stripe_key(layer, i), f"{stripe}/{name}", range(i, count, len(stripes)), layout, make)
        for i, stripe in enumerate(stripes)
    ]


def stripe_key(layer: int, stripe: int) -> str:
    """The key of a stripe's experts file of a layer."""
    return f"{layer_key(layer)}.{stripe}"


def key_of_layer(key: str) -> str:
    """The key of the layer that a file belongs to; other keys stay what they are."""
    return key.partition(".")[0]


def _experts_unit(key: str, file: str, experts: range, layout: FfnLayout, make: Callable[[int], U8]) -> Unit:
    """A file of experts; ``make`` makes the layout.nbytes bytes of a record."""
    record_nbytes = layout.record_nbytes
    padding = np.zeros(record_nbytes - layout.nbytes, np.uint8)

    def chunks(expert: int) -> Iterator[U8]:
        yield make(expert)
        yield padding

    def piece(index: int) -> Piece:
        expert = experts[index]
        return Piece(f"expert {expert}", record_nbytes, lambda: chunks(expert))

    return Unit(key, file, len(experts), len(experts) * record_nbytes, piece)


def tensor_records(unit: Unit, slots: Sequence[Slot], hashes: Sequence[str]) -> dict[str, TensorRecord]:
    """The manifest's tensors of a finished resident unit; ``hashes`` are those of its pieces."""
    by_name = {unit.piece(i).name: digest for i, digest in enumerate(hashes)}
    return {slot.name: TensorRecord(slot.codec, tuple(slot.shape), by_name[slot.name]) for slot in slots}


def layer_record(
    layer: int, layout: FfnLayout, pieces: Callable[[str], Sequence[tuple[int, str]]], stripes: int = 0
) -> LayerRecord:
    """The manifest's entry of a layer whose files are finished; ``pieces``: (bytes, hash) of those of a key."""
    keys = [stripe_key(layer, i) for i in range(stripes)] or [layer_key(layer)]
    parts = [[digest for _, digest in pieces(key)] for key in keys]
    hashes = [""] * sum(map(len, parts))
    for i, part in enumerate(parts):
        hashes[i :: len(parts)] = part
    file = _experts_file(layer)
    name = Path(file).name if stripes else file
    return LayerRecord(layer, name, layout.record_nbytes, layout, tuple(hashes))


def _experts_file(layer: int) -> str:
    return f"{EXPERTS_FOLDER}/layer-{layer:03d}.bin"


def _entry(slot: Slot) -> Entry:
    shape = stored_shape(slot.codec, tuple(slot.shape))
    dtype, itemsize = ("F32", 4) if isinstance(slot.codec, DenseCodec) else ("U8", 1)
    return Entry(slot.name, dtype, shape, math.prod(shape) * itemsize)
