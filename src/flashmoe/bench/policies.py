"""Replacement policies on a running engine, in alternation: hits and speed, beside what a replay foretells.

Every run is a process of its own and decodes the same tokens.  The model's own routers choose the experts, or those of
a trace do (routing.py).  The first policy is what the others are compared with.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from flashmoe import env
from flashmoe.bench.process import run_module, serve
from flashmoe.bench.replay import Material, Setting, replay
from flashmoe.bench.routing import ReplayedRouting, cut, onto, save_trace
from flashmoe.bench.split import part_of
from flashmoe.bench.stream import observed
from flashmoe.bundle.reader import Bundle
from flashmoe.engine.engine import Engine, EngineOptions
from flashmoe.engine.tokenizer import TextTokenizer
from flashmoe.engine.workbench import Workbench
from flashmoe.errors import ConfigError, FlashmoeError
from flashmoe.learning.train import train
from flashmoe.store.policies.learned_file import save_learned
from flashmoe.store.policies.registry import LEARNED, Geometry
from flashmoe.store.trace import Trace, read_trace

_SEQUENCE = 256  # tokens of a text that are decoded before the next sequence begins
Note = Callable[[str], None]


@dataclass(frozen=True)
class TrialOptions:
    """What is compared.

    slots: for each layer, shared as in a run.  trace: whose test part drives the routers; text: what the model decodes
    with its own ones; exactly one of them.  teach: tokens of the text that `learned` is trained on, in a trace it is
    the train part.  warm: tokens before those that are measured.
    """

    bundle: Path
    policies: Sequence[str]
    slots: int
    trace: Path | None = None
    text: Path | None = None
    memory_bytes: int | None = None
    teach: int = 1024
    warm: int = 64
    tokens: int = 256
    repeats: int = 3


@dataclass(frozen=True)
class RunOptions:
    """One process: decode the trace's tokens.  own_routers: they choose; record: file that gets what they chose."""

    bundle: str
    policy: str
    slots: int
    trace: str
    warm: int
    own_routers: bool
    memory_bytes: int | None = None
    record: str | None = None


def compare(options: TrialOptions, note: Note) -> list[dict[str, Any]]:
    """Every run's measurements, in the order in which they were made; JSON values.

    Raises FlashmoeError when two runs gave different logits, and what engines, traces and training raise.
    """
    geometry = _geometry(options.bundle)
    with tempfile.TemporaryDirectory(prefix="flashmoe-bench-") as folder:
        drive = Path(folder, "drive.npz")
        note("the trace")
        taught, driving = _traces(options, geometry, Path(folder))
        save_trace(driving, drive)
        specs = {}
        for name in options.policies:
            specs[name] = name
            if name == LEARNED:
                note("training")
                save_learned(Path(folder, "policy"), train(taught))
                specs[name] = f"{LEARNED}:{Path(folder, 'policy')}"
        foretold = {name: _foretell(spec, driving, geometry, options) for name, spec in specs.items()}
        runs = []
        for repeat in range(options.repeats):
            for name, spec in specs.items():
                note(f"{name}, {repeat + 1} of {options.repeats}")
                wanted = _run(options, spec, drive)
                report = run_module("flashmoe.bench.policies", asdict(wanted))
                runs.append({"policy": name, "round": repeat, "replayed_hit_rate": foretold[name], **report})
    if len({run["logits_xxh3"] for run in runs}) != 1:
        raise FlashmoeError(f"{options.bundle}: two policies gave different logits: report this as a bug")
    return runs


def _geometry(path: Path) -> Geometry:
    bundle = Bundle.open(path)
    layers = bundle.expert_layers
    if not layers:
        raise ConfigError(f"{path}: the model has no routed experts, so no policy has anything to decide")
    return Geometry(tuple(layer.layer for layer in layers), layers[0].count, bundle.manifest.experts_identity)


def _traces(options: TrialOptions, geometry: Geometry, folder: Path) -> tuple[Trace, Trace]:
    """What to learn from, and what every run decodes."""
    wanted = options.warm + options.tokens
    if options.trace is not None:
        whole = read_trace(options.trace).decoding()
        taught, rest = (onto(part_of(whole, part), geometry) for part in ("train", "test"))
        return taught, cut(rest, wanted)
    if options.text is None:
        raise ConfigError("neither a trace nor a text says what to decode: give --trace or --text")
    ids = TextTokenizer.open(options.bundle).encode(_read(options.text))
    if len(ids) < options.teach + wanted:
        raise ConfigError(
            f"{options.text}: {len(ids)} tokens are fewer than {options.teach + wanted}: give a longer text"
        )
    planned, recorded = folder / "text.npz", folder / "recorded.npz"
    save_trace(_silent(ids[: options.teach + wanted], options.teach, geometry), planned)
    run_module("flashmoe.bench.policies", asdict(_run(options, "lru", planned, record=str(recorded))))
    trace = read_trace(recorded)
    index = np.arange(trace.tokens)
    return trace.select(index < options.teach), trace.select(index >= options.teach)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: no UTF-8 text: give a plain text file") from None


def _silent(ids: list[int], teach: int, geometry: Geometry) -> Trace:
    """A trace that says which tokens to decode and nothing of experts; a sequence ends after `teach` tokens."""
    tokens = len(ids)
    sequences = (np.arange(tokens) - teach) // _SEQUENCE
    return Trace(
        path=Path("text"),
        expert_ids=np.zeros((tokens, len(geometry.layers), 1), np.uint16),
        router_weights=None,
        token_ids=np.array(ids, np.int32),
        sequences=sequences.astype(np.int32),
        steps=np.arange(tokens, dtype=np.int32),
        phases=np.ones(tokens, np.uint8),
        domains=None,
        layers=geometry.layers,
        experts=geometry.experts,
        model=geometry.identity,
    )


def _run(options: TrialOptions, policy: str, trace: Path, record: str | None = None) -> RunOptions:
    return RunOptions(
        str(options.bundle),
        policy,
        options.slots,
        str(trace),
        options.warm,
        options.trace is None,
        options.memory_bytes,
        record,
    )


def _foretell(spec: str, trace: Trace, geometry: Geometry, options: TrialOptions) -> float:
    """The hit rate that a replay gives for the measured tokens."""
    outcome = replay(Material.of(trace), spec, Setting(options.slots, "shared"), geometry)
    measured = slice(options.warm, None)
    return float(outcome.hits[measured].sum() / outcome.asked[measured].sum())


def measure(options: RunOptions) -> dict[str, Any]:
    """Open the bundle and decode the trace's tokens, sequence by sequence; JSON values."""
    trace = read_trace(Path(options.trace))
    longest = int(np.diff(np.r_[trace.sequence_starts(), trace.tokens]).max())
    engine_options = EngineOptions(
        options.memory_bytes,
        context=max(512, longest),
        experts_per_token=None if options.own_routers else trace.per_token,
        expert_slots=options.slots * len(trace.layers),
        lookahead="off",
        policy=options.policy,
        record_trace=None if options.record is None else Path(options.record),
    )
    with Engine.open(Path(options.bundle), engine_options) as engine:
        routing = None if options.own_routers else ReplayedRouting(engine, trace)
        bench, digest = Workbench(engine), xxhash.xxh3_64()
        decoding = _Decoding(engine, trace, routing, digest)
        decoding.run(range(options.warm))
        measured = range(options.warm, trace.tokens)
        report = observed(bench, lambda: decoding.run(measured), len(measured))
        return report | {
            "slots": engine.plan.slots,
            "experts": engine.plan.experts,
            "memory_bytes": engine.plan.budget_nbytes,
            "peak_memory_bytes": env.peak_memory(),
            "logits_xxh3": digest.hexdigest(),
        }


class _Decoding:
    """A trace's tokens, one step after another; a sequence's first token begins with an empty state."""

    def __init__(self, engine: Engine, trace: Trace, routing: ReplayedRouting | None, digest: Any) -> None:
        self._engine, self._routing, self._digest = engine, routing, digest
        vocab = engine._parts.model.config.vocab_size
        self._ids: list[int] = (trace.token_ids % vocab).tolist()
        self._starts = set(trace.sequence_starts().tolist())

    def run(self, tokens: range) -> None:
        engine = self._engine
        for i in tokens:
            if i in self._starts:
                engine.start()
            if self._routing is not None:
                self._routing.token = i
            self._digest.update(engine.feed([self._ids[i]], "last").data)


if __name__ == "__main__":
    serve(lambda options: measure(RunOptions(**options)))
