"""What a conversion will write: every tensor and expert with its form, size and sources."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from flashmoe.bundle.codecs import Codec, DenseCodec, FfnLayout
from flashmoe.checkpoint import Checkpoint, Matrix
from flashmoe.checkpoint.dtypes import HalfType
from flashmoe.checkpoint.tensors import TensorRef
from flashmoe.convert.biases import Bias, Biases
from flashmoe.convert.bits import DEFAULT_BITS, SENSITIVE_BITS, Bits, part_of
from flashmoe.convert.encode import Form, Part, choose_form, needs_scan, plain_scale_type, scan_scale_type
from flashmoe.convert.importance import NO_IMPORTANCE, Importance
from flashmoe.convert.views import ordered
from flashmoe.errors import CheckpointError, ConfigError
from flashmoe.models.registry import find_family
from flashmoe.models.spec import (
    BiasSource,
    ExpertsSpec,
    FfnSource,
    FfnSpec,
    MatrixSource,
    MatrixSpec,
    Order,
    VectorSpec,
)

FITS = ("squares", "range")

# Decisions that needed a look at the data: key -> (scale type, whether it holds the source's scales exactly).
ScaleTypes = dict[str, tuple[HalfType, bool]]


@dataclass(frozen=True)
class VectorItem:
    """A float tensor of the bundle."""

    name: str
    spec: VectorSpec
    ref: TensorRef

    @property
    def codec(self) -> Codec:
        """Plain float32."""
        return DenseCodec("f32")

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        return self.spec.shape


@dataclass(frozen=True)
class MatrixItem:
    """A quantised matrix of the bundle."""

    name: str
    shape: tuple[int, int]
    part: Part
    form: Form

    @property
    def codec(self) -> Codec:
        """The tile codec."""
        return self.form.codec


@dataclass(frozen=True)
class FfnItem:
    """An FFN record of the bundle: parts are gate, up, down."""

    name: str
    codec: FfnLayout
    parts: tuple[Part, Part, Part]
    gate_up: Form
    down: Form

    @property
    def shape(self) -> tuple[int, int]:
        """[intermediate, hidden], as the manifest states it."""
        return self.codec.intermediate, self.codec.hidden


@dataclass(frozen=True)
class ExpertsItem:
    """All experts of one layer; ``parts(e)`` are gate, up and down of expert e."""

    layer: int
    count: int
    layout: FfnLayout
    parts: Callable[[int], tuple[Part, Part, Part]]
    gate_up: Form
    down: Form
    biases: Callable[[int], Biases] | None = None  # of gate, up and down of expert e


Item = VectorItem | MatrixItem | FfnItem


@dataclass(frozen=True)
class Plan:
    """All items in the order of the files, and what their making costs in exactness."""

    model_type: str
    tied: bool
    resident: Sequence[Item]
    experts: Sequence[ExpertsItem]
    scale_types: ScaleTypes

    @cached_property
    def forms(self) -> list[tuple[Form, tuple[Part, ...]]]:
        """Every form with sample parts it is used for (of the experts, those of expert 0)."""
        found: list[tuple[Form, tuple[Part, ...]]] = []
        for item in self.resident:
            if isinstance(item, MatrixItem):
                found.append((item.form, (item.part,)))
            elif isinstance(item, FfnItem):
                found += [(item.gate_up, item.parts[:2]), (item.down, item.parts[2:])]
        for layer in self.experts:
            parts = layer.parts(0)
            found += [(layer.gate_up, parts[:2]), (layer.down, parts[2:])]
        return found

    @property
    def requantised(self) -> bool:
        """True when codes of the source were thrown away for others."""
        return any(not f.keep_codes and any(p.bits for p in parts) for f, parts in self.forms)

    @property
    def lossless(self) -> bool:
        """True when every weight of the bundle equals the source's, bit for bit after dequantisation."""
        return (
            all(form.keep_codes for form, _ in self.forms)
            and all(exact for _, exact in self.scale_types.values())
            and not any(part.rounded for _, parts in self.forms for part in parts)
        )

    @property
    def note(self) -> str:
        """One sentence for people on what happens to the weights."""
        if self.lossless:
            return "lossless: the source's own codes, scales and biases"
        clauses = []
        if self.requantised:
            clauses.append("lossy: codes of the source were quantised a second time, to fewer bits")
        fitted = {
            (part.matrix.form, form.codec.bits)
            for form, parts in self.forms
            for part in parts
            if not form.keep_codes and part.bits is None
        }
        clauses += [
            f"{form} quantised anew to {bits} bit" for form, bits in sorted(fitted) if form != "floats"
        ]
        if any(form.keep_codes for form, _ in self.forms):
            clauses.append(self._kept)
        floats = sorted({bits for form, bits in fitted if form == "floats"})
        if floats:
            sizes = " and ".join(map(str, floats))
            clauses.append(f"quantised from floats to {sizes} bit")
        return "; ".join(clauses)

    @property
    def _kept(self) -> str:
        """What is true of all codes that are kept."""
        kept = {part.matrix.form for form, parts in self.forms if form.keep_codes for part in parts}
        exact = all(exact for _, exact in self.scale_types.values())
        rounded = not exact or any(
            part.rounded for form, parts in self.forms if form.keep_codes for part in parts
        )
        codes = f"codes of {', '.join(sorted(kept))} kept"
        return f"nearly lossless: {codes}, scales rounded to 16 bits" if rounded else codes

    def resident_refs(self) -> Iterator[TensorRef]:
        """The checkpoint tensors of the resident items."""
        for item in self.resident:
            if isinstance(item, VectorItem):
                yield item.ref
            else:
                for part in (item.part,) if isinstance(item, MatrixItem) else item.parts:
                    yield from part.matrix.refs()


def layer_refs(item: ExpertsItem) -> set[TensorRef]:
    """The checkpoint tensors of a layer's experts."""
    refs = {ref for e in range(item.count) for part in item.parts(e) for ref in part.matrix.refs()}
    if item.biases is not None:
        refs |= {bias.ref for e in range(item.count) for bias in item.biases(e)}
    return refs


@dataclass(frozen=True)
class Wishes:
    """What a conversion was asked for: bits, how floats are fitted (FITS), and mean squares of inputs, if known."""

    bits: Bits = field(default_factory=Bits)
    fit: str = FITS[0]
    importance: Importance = NO_IMPORTANCE


def make_plan(checkpoint: Checkpoint, wishes: Wishes, scale_types: ScaleTypes | None = None) -> Plan:
    """Plan the conversion of a checkpoint.

    ``scale_types`` are the decisions of an earlier plan of the same checkpoint, so that its data need not be there
    any more.  Raises ConfigError for a model flashmoe does not do or wishes that contradict each other,
    CheckpointError when a tensor is missing or has another size than config.json asks for.
    """
    if wishes.fit not in FITS:
        raise ConfigError(f"--fit {wishes.fit} is not offered: choose {' or '.join(FITS)}")
    family = find_family(checkpoint.config)
    spec = family.spec(family.config(checkpoint.config))
    checkpoint.skip(spec.unused)
    planner = _Planner(checkpoint, wishes, scale_types, spec.tied)
    resident = [planner.item(s) for s in spec.resident]
    experts = [planner.experts(s) for s in spec.experts]
    return Plan(family.model_type, spec.tied, resident, experts, planner.scale_types)


class _Planner:
    def __init__(
        self, checkpoint: Checkpoint, wishes: Wishes, scale_types: ScaleTypes | None, tied: bool
    ) -> None:
        self._checkpoint = checkpoint
        self._bits, self._fit, self._importance = wishes.bits, wishes.fit, wishes.importance
        self._table_part = wishes.bits.of_tied_table() if tied else "embedding"
        self._known = scale_types
        self._ordered: dict[tuple[str, int, Order], Matrix] = {}
        self.scale_types: ScaleTypes = {}

    def item(self, spec: VectorSpec | MatrixSpec | FfnSpec) -> Item:
        if isinstance(spec, VectorSpec):
            return VectorItem(spec.name, spec, self._checkpoint.ref(spec.source))
        if isinstance(spec, MatrixSpec):
            source = next((s for s in spec.others if self._checkpoint.has(s.module)), spec.source)
            part = self._part(source, spec.name)
            form = self._form(spec.name, [part], self._matrix_bits(spec, part))
            shape = spec.source.picked_rows, spec.source.cols
            _check_cols(part, form)
            return MatrixItem(spec.name, shape, part, form)
        parts = self._parts(spec.source, spec.name)
        asked = self._bits.asked(part_of(spec), spec.name)
        bits = self._kept_or(parts[0], self._bits.resident) if asked is None else asked
        gate_up, down = self._ffn_forms(spec.name, parts[:2], parts[2:], bits)
        layout = FfnLayout(spec.hidden, spec.intermediate, gate_up.codec, down.codec)
        return FfnItem(spec.name, layout, parts, gate_up, down)

    def experts(self, spec: ExpertsSpec) -> ExpertsItem:
        source = self._expert_form(spec)
        every = [self._parts(source(e), f"experts.{spec.layer}.{e}") for e in range(spec.count)]
        name = f"experts.{spec.layer}"
        gates, downs = [p for parts in every for p in parts[:2]], [parts[2] for parts in every]
        asked = self._bits.asked("experts", f"layers.{spec.layer}")
        gate_up, down = self._ffn_forms(name, gates, downs, asked or self._bits.uniform)
        layout = FfnLayout(spec.hidden, spec.intermediate, gate_up.codec, down.codec, spec.glu, spec.biased)
        biases = [self._biases(source(e)) for e in range(spec.count)] if spec.biased else None
        return ExpertsItem(
            spec.layer,
            spec.count,
            layout,
            every.__getitem__,
            gate_up,
            down,
            None if biases is None else biases.__getitem__,
        )

    def _biases(self, source: FfnSource) -> Biases:
        assert source.biases is not None  # the specification says so
        gate, up, down = (self._bias(bias) for bias in source.biases)
        return gate, up, down

    def _bias(self, source: BiasSource) -> Bias:
        ref = self._checkpoint.ref(source.tensor)
        return Bias.of(ref, (source.rows, source.cols), source.row, source.first, source.step)

    def _matrix_bits(self, spec: MatrixSpec, part: Part) -> int | None:
        """None: the source's own, or the default of floats."""
        name = self._table_part if spec.name == "embed_tokens" else part_of(spec)
        plain = spec.role == "plain"
        # A few rows of a linear-attention layer (decay, write strength) keep eight bits whatever the others get.
        asked = self._bits.asked(name, spec.name) if plain or name == "router" else None
        if asked is not None:
            return asked
        if not plain and part.bits is None:
            return SENSITIVE_BITS
        return self._kept_or(part, self._bits.resident if plain else None)

    def _kept_or(self, part: Part, bits: int | None) -> int | None:
        """``bits``, unless the source's codes are as small already: widening them would only cost memory."""
        return None if part.bits is not None and bits is not None and part.bits <= bits else bits

    def _ffn_forms(
        self, name: str, gate_up: Sequence[Part], down: Sequence[Part], bits: int | None
    ) -> tuple[Form, Form]:
        up_form = self._form(f"{name}.gate_up", gate_up, bits)
        _check_cols(gate_up[0], up_form)
        return up_form, self._form(f"{name}.down", down, bits)

    def _form(self, key: str, parts: Sequence[Part], bits: int | None) -> Form:
        form = choose_form(parts, bits, DEFAULT_BITS, plain_scale_type(parts), self._fit)
        if not form.keep_codes or not needs_scan(parts):
            return form
        decision = scan_scale_type(parts) if self._known is None else self._known[key]
        self.scale_types[key] = decision
        return choose_form(parts, bits, DEFAULT_BITS, decision[0], self._fit)

    def _expert_form(self, spec: ExpertsSpec) -> Callable[[int], FfnSource]:
        for form in spec.forms:
            if self._checkpoint.has(form(0).mark or form(0).gate.module):
                return form
        names = ", ".join(repr(form(0).mark or form(0).gate.module) for form in spec.forms)
        raise CheckpointError(
            f"{self._checkpoint.path} has no experts of layer {spec.layer} (none of {names}):"
            " download all of it again"
        )

    def _parts(self, source: FfnSource, name: str) -> tuple[Part, Part, Part]:
        gate_up, down = (f"{name}.{which}" for which in ("gate_up", "down"))
        return self._part(source.gate, gate_up), self._part(source.up, gate_up), self._part(source.down, down)

    def _part(self, source: MatrixSource, name: str) -> Part:
        return Part(self._matrix(source), source.runs, self._importance.reader(name, source.cols))

    def _matrix(self, source: MatrixSource) -> Matrix:
        order = source.order
        if order is None:
            return self._checkpoint.matrix(source.module, source.rows, source.cols)
        key = source.module, source.cols, order
        if key not in self._ordered:  # shared, as it may hold what the next of its rows need
            stored = self._checkpoint.matrix(source.module, order.stored_rows, order.stored_cols)
            self._ordered[key] = ordered(stored, source.cols, order.turned, order.woven)
        return self._ordered[key]


def scale_types_to_json(scale_types: ScaleTypes) -> dict[str, Any]:
    """JSON form of the decisions."""
    return {key: list(value) for key, value in scale_types.items()}


def scale_types_from_json(value: Mapping[str, Any]) -> ScaleTypes:
    """The inverse of scale_types_to_json."""
    return {key: (dtype, exact) for key, (dtype, exact) in value.items()}


def _check_cols(part: Part, form: Form) -> None:
    matrix = part.matrix
    if matrix.cols % form.codec.group:
        raise CheckpointError(
            f"{matrix.where} has {matrix.cols} columns, no multiple of {form.codec.group}:"
            " flashmoe cannot tile this model"
        )
