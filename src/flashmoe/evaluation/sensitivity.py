"""What fewer bits for one part of one layer cost: the divergence of the whole model's predictions, measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from flashmoe.bundle.codecs import (
    TILE_BITS,
    U8,
    FfnLayout,
    Quantized,
    TileCodec,
    dequantize_ffn,
    pack_ffn,
)
from flashmoe.bundle.reader import Bundle
from flashmoe.checkpoint.dtypes import F32
from flashmoe.convert.bits import part_of, unit_key
from flashmoe.convert.fit import fit
from flashmoe.convert.importance import Importance
from flashmoe.engine.observer import Tile, Trial
from flashmoe.models.registry import find_family
from flashmoe.models.spec import FfnSpec, MatrixSpec

_TRIED = (2, 3, 4)


@dataclass(frozen=True)
class Unit:
    """Tensors of the bundle that get their bits together: a part of a layer, or the head.

    layer: whose experts they are, for experts.  bits: what they have now.  weights: how many there are.
    """

    key: str
    names: tuple[str, ...]
    layer: int | None
    bits: int
    weights: int


class Sensitivity:
    """Trials of every unit of a bundle with fewer bits, fitted to what the bundle's own weights say.

    Memory: one unit without experts, or one expert.  Immutable.
    """

    def __init__(self, bundle: Bundle, importance: Importance) -> None:
        self._bundle, self._importance = bundle, importance
        self._layers = {layer.layer: layer for layer in bundle.expert_layers}

    @cached_property
    def units(self) -> Sequence[Unit]:
        """In the order of the model.  Routers, gates of a few rows and an untied embedding are none: they stay."""
        family = find_family(self._bundle.config)
        spec = family.spec(family.config(self._bundle.config))
        names: dict[str, list[str]] = {}
        for item in spec.resident:
            if isinstance(item, FfnSpec) or (isinstance(item, MatrixSpec) and item.role == "plain"):
                part = "head" if spec.tied and item.name == "embed_tokens" else part_of(item)
                if part != "embedding":
                    names.setdefault(unit_key(part, item.name), []).append(item.name)
        units = [self._resident_unit(key, found) for key, found in names.items()]
        return units + [self._expert_unit(layer) for layer in self._layers]

    def unseen(self) -> str | None:
        """A tensor whose input no importance is known of: a trial of it would go unseen too."""
        for unit in self.units:
            for name in unit.names:
                info = self._bundle.tensor(name)
                key = f"{name}.gate_up" if isinstance(info.codec, FfnLayout) else name
                if self._importance.reader(key, info.cols)() is None:
                    return name
        return None

    def tried_bits(self, unit: Unit) -> Sequence[int]:
        """Numbers of bits below the unit's own that are worth a trial."""
        return [bits for bits in _TRIED if bits < unit.bits]

    def nbytes(self, unit: Unit, bits: int) -> int:
        """Bytes of the unit in a bundle."""
        if unit.layer is not None:
            layer = self._layers[unit.layer]
            return layer.count * _narrow_ffn(layer.ffn, bits).record_nbytes
        return sum(self._stored(name, bits) for name in unit.names)

    def trial(self, unit: Unit, bits: int) -> Trial:
        """The unit's weights with so many bits."""
        if unit.layer is not None:
            layout = _narrow_ffn(self._layers[unit.layer].ffn, bits)
            return Trial(layer=unit.layer, layout=layout, expert=self._expert_maker(unit.layer, layout))
        matrices: dict[str, Tile] = {}
        records: dict[str, tuple[U8, FfnLayout]] = {}
        for name in unit.names:
            info, raw = self._bundle.tensor(name), self._bundle.read(name)
            if isinstance(info.codec, FfnLayout):
                layout = _narrow_ffn(info.codec, bits)
                records[name] = self._record(name, info.codec, raw, layout), layout
            else:
                assert isinstance(info.codec, TileCodec)
                codec = TileCodec(bits, info.codec.group)
                values = info.codec.dequantize(raw, info.rows, info.cols)
                matrices[name] = Tile(
                    codec.pack(*self._fit(name, values, codec)).reshape(-1), codec, info.rows, info.cols
                )
        return Trial(matrices, records)

    def _resident_unit(self, key: str, names: Sequence[str]) -> Unit:
        infos = [self._bundle.tensor(name) for name in names]
        bits = max(_bits(info.codec) for info in infos)  # type: ignore[arg-type]
        weights = sum(
            info.rows * info.cols * (3 if isinstance(info.codec, FfnLayout) else 1) for info in infos
        )
        return Unit(key, tuple(names), None, bits, weights)

    def _expert_unit(self, layer: int) -> Unit:
        found = self._layers[layer]
        weights = 3 * found.ffn.hidden * found.ffn.intermediate * found.count
        return Unit(unit_key("experts", f"layers.{layer}"), (), layer, _bits(found.ffn), weights)

    def _stored(self, name: str, bits: int) -> int:
        info = self._bundle.tensor(name)
        if isinstance(info.codec, FfnLayout):
            return _narrow_ffn(info.codec, bits).nbytes
        assert isinstance(info.codec, TileCodec)
        return TileCodec(min(bits, info.codec.bits), info.codec.group).matrix_nbytes(info.rows, info.cols)

    def _expert_maker(self, layer: int, layout: FfnLayout) -> Callable[[int], U8]:
        own = self._layers[layer].ffn
        return lambda expert: self._record(
            f"experts.{layer}.{expert}", own, self._bundle.read_expert(layer, expert), layout
        )

    def _record(self, name: str, own: FfnLayout, raw: U8, layout: FfnLayout) -> U8:
        gate, up, down = self._fitted_parts(name, dequantize_ffn(own, raw), layout)
        return pack_ffn(layout, gate, up, down)

    def _fitted_parts(self, name: str, parts: tuple[F32, F32, F32], layout: FfnLayout) -> Iterator[Quantized]:
        for values, which, codec in zip(
            parts, ("gate_up", "gate_up", "down"), (layout.gate_up, layout.gate_up, layout.down), strict=True
        ):
            yield self._fit(f"{name}.{which}", values, codec)

    def _fit(self, name: str, values: F32, codec: TileCodec) -> Quantized:
        importance = self._importance.reader(name, values.shape[1])()
        return fit(np.ascontiguousarray(values), codec.bits, codec.group, importance)


def _bits(codec: TileCodec | FfnLayout) -> int:
    if isinstance(codec, FfnLayout):
        return max(codec.gate_up.bits, codec.down.bits)
    return codec.bits


def _narrow_ffn(own: FfnLayout, bits: int) -> FfnLayout:
    assert bits in TILE_BITS
    gate_up, down = (TileCodec(min(bits, codec.bits), codec.group) for codec in (own.gate_up, own.down))
    return FfnLayout(own.hidden, own.intermediate, gate_up, down)
