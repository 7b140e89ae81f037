"""From a bundle directory to the parts of a running engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from flashmoe import env
from flashmoe.bundle.codecs import U8
from flashmoe.bundle.manifest import MANIFEST_FILE
from flashmoe.bundle.reader import Bundle
from flashmoe.engine import memory
from flashmoe.engine.bound import measure_drive
from flashmoe.engine.embedding import make_embedding, streamed_nbytes, table_nbytes
from flashmoe.engine.experts import StreamedExperts
from flashmoe.engine.lookahead import MODES as LOOKAHEAD_MODES
from flashmoe.engine.resident import ResidentWeights, resident_range
from flashmoe.engine.warming import Warming, usage_path
from flashmoe.errors import ConfigError, TraceError
from flashmoe.kernels.cpu import CpuOps
from flashmoe.kernels.kv_cache import CACHE_DTYPES
from flashmoe.models.architecture import Architecture
from flashmoe.models.config import ModelConfig
from flashmoe.models.decoder import Decoder, SequenceState
from flashmoe.models.fit import check_fit
from flashmoe.models.registry import ModelFamily, find_family
from flashmoe.store.cache import ExpertCache
from flashmoe.store.policies.base import Policy
from flashmoe.store.policies.fifo import Fifo
from flashmoe.store.policies.registry import DEFAULT, Geometry, chosen, policy_maker
from flashmoe.store.reader import MOST_IN_FLIGHT, NativeReader
from flashmoe.store.sizes import min_slots
from flashmoe.store.slots import SlotArena
from flashmoe.store.trace_writer import TraceWriter

if TYPE_CHECKING:
    from flashmoe.engine.engine import EngineOptions

# A context nobody asked for should not take memory from the experts: 8,192 tokens of the 35B are 160 MiB.
DEFAULT_CONTEXT = 8192
QUEUE_DEPTH = 8  # reads in flight for each directory of experts
MAX_SEQUENCES = 16  # decoded together: the tokens of the smallest step that every memory plan has room for
_IO_MODES = {"auto": "auto", "direct": "on", "buffered": "off"}


@dataclass
class Parts:
    """What an engine is made of."""

    bundle: Bundle
    plan: memory.MemoryPlan
    ops: CpuOps
    reader: NativeReader
    weights: ResidentWeights
    cache: ExpertCache
    experts: StreamedExperts
    warming: Warming
    model: Decoder
    states: list[SequenceState]  # one for each sequence that a step can hold
    drive_bandwidth: float
    token_nbytes: int  # memory that one decoded token must read
    recorder: TraceWriter | None = None
    memory_bandwidth: float | None = None


def load(path: Path, options: EngineOptions) -> Parts:
    """Open, plan, read the resident weights, build the model.  Raises only FlashmoeError subclasses."""
    bundle = Bundle.open(path, options.experts_dirs)
    family = find_family(bundle.config)
    config = _config(family, bundle, options)
    check_fit(bundle, family, config)
    context = _context(config, options)
    kv_cache = _kv_cache(options)
    kv_dtype = CACHE_DTYPES[kv_cache]
    per_token = config.num_experts_per_tok
    architecture = family.architecture(config)
    policy = _policy(bundle, config, options)  # before the plan, which counts what the process holds
    recorder = _recorder(bundle, config, per_token, options)
    ops = CpuOps(options.threads or env.cpu_count(), options.activations)
    first, end = resident_range(bundle)
    demand = model_demand(
        architecture,
        resident_nbytes=end - first + streamed_nbytes(bundle),
        record_nbytes=max((layer.record_nbytes for layer in bundle.expert_layers), default=0),
        experts=sum(layer.count for layer in bundle.expert_layers),
        context=context,
        kv_cache=kv_cache,
        embedding_nbytes=table_nbytes(bundle),
        sequences=options.sequences,
        prefix_cache_nbytes=options.prefix_cache_bytes,
        logit_rows=options.logit_rows,
    )
    plan = memory.make_plan(demand, options.memory_bytes, options.prefill_chunk, options.expert_slots)
    reader = NativeReader(
        reader_files(bundle),
        direct=_IO_MODES[options.io],
        queue_depth=min(QUEUE_DEPTH * len(bundle.experts_dirs), MOST_IN_FLIGHT),
    )
    arena = SlotArena(plan.slots, plan.record_nbytes)
    layers = bundle.expert_layers
    drive = measure_drive(reader, arena, _expert_files(bundle))
    weights = ResidentWeights(bundle, ops, reader, 0, plan.embedding_resident, options.verify_reads)
    cache = _cache(bundle, reader, arena, policy, per_token, options.verify_reads)
    embed = make_embedding(bundle, weights, ops, reader, 0, plan.embedding_resident)
    model = Decoder(architecture, weights, ops, embed=embed, context=context)
    warming = _warming(bundle, options)
    experts = StreamedExperts(
        ops,
        cache,
        arena,
        {layer.layer: layer.ffn for layer in layers},
        options.lookahead,
        config.num_experts,
        warming.counts,
        recorder,
        plan.prefill_chunk,
    )
    token_nbytes = _token_nbytes(bundle, per_token) + architecture.state_traffic()
    states = [model.new_state(kv_dtype) for _ in range(options.sequences)]
    head = (bundle, plan, ops, reader, weights, cache, experts, warming, model, states, drive)
    parts = Parts(*head, token_nbytes, recorder)
    warming.begin(cache, plan.slots, plan.record_nbytes)
    return parts


def reader_files(bundle: Bundle) -> list[Path]:
    """The files of a reader, by index: the resident weights, then each layer's experts, stripe by stripe."""
    return [bundle.resident_path, *(path for layer in bundle.expert_layers for path in layer.paths)]


def _expert_files(bundle: Bundle) -> list[tuple[int, int, int]]:
    """(index in reader_files, records, bytes of a record); neighbours lie in different directories."""
    stripes = len(bundle.experts_dirs)
    return [
        (1 + i * stripes + stripe, layer.records(stripe), layer.record_nbytes)
        for i, layer in enumerate(bundle.expert_layers)
        for stripe in range(stripes)
    ]


def model_demand(
    architecture: Architecture,
    *,
    resident_nbytes: int,
    record_nbytes: int,
    experts: int,
    context: int | None,
    kv_cache: str = "f16",
    embedding_nbytes: int = 0,
    sequences: int = 1,
    prefix_cache_nbytes: int = 0,
    logit_rows: int = 1,
) -> memory.Demand:
    """What the planner must know of a model; context None is the default one."""
    config = architecture.config
    rows = max(sequences, 2 * logit_rows if logit_rows > 1 else 1)  # feed() copies the logits of all
    context = context or min(config.max_position_embeddings, DEFAULT_CONTEXT)
    return memory.Demand(
        resident_nbytes=resident_nbytes,
        state_nbytes=architecture.state_nbytes(context, CACHE_DTYPES[kv_cache], sequences)
        + prefix_cache_nbytes,
        workspace_nbytes=lambda tokens: architecture.workspace_nbytes(tokens, rows),
        record_nbytes=record_nbytes,
        experts=experts,
        min_slots=min_slots(config.num_experts_per_tok) if experts else 0,
        context=context,
        embedding_nbytes=embedding_nbytes,
        kv_cache=kv_cache,
        sequences=sequences,
    )


def _config(family: ModelFamily, bundle: Bundle, options: EngineOptions) -> ModelConfig:
    if options.io not in _IO_MODES:
        raise ConfigError(f"unknown --io {options.io!r}: choose auto, direct or buffered")
    for name in ("context", "threads", "experts_per_token", "prefill_chunk", "expert_slots"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not 1 <= options.sequences <= MAX_SEQUENCES:
        raise ConfigError(
            f"--parallel must be between 1 and {MAX_SEQUENCES} sequences, got {options.sequences}"
        )
    if options.lookahead not in LOOKAHEAD_MODES:
        raise ConfigError(
            f"unknown --lookahead {options.lookahead!r}: choose one of {', '.join(LOOKAHEAD_MODES)}"
        )
    return with_experts_per_token(family.config(bundle.config), options.experts_per_token)


def with_experts_per_token(config: ModelConfig, wanted: int | None) -> ModelConfig:
    """The model with so many experts a token; None is its own number.  Raises ConfigError when it has fewer."""
    if wanted is None:
        return config
    if wanted > config.num_experts:
        raise ConfigError(f"--experts-per-token {wanted}: the model has {config.num_experts or 'no'} experts")
    return replace(config, num_experts_per_tok=wanted)


def _kv_cache(options: EngineOptions) -> str:
    name = options.kv_cache or ("f32" if options.activations == "f32" else "f16")
    if name not in CACHE_DTYPES:
        raise ConfigError(f"unknown --kv-cache {name!r}: choose one of {', '.join(CACHE_DTYPES)}")
    return name


def _context(config: ModelConfig, options: EngineOptions) -> int:
    most = config.max_position_embeddings
    if options.context is not None and options.context > most:
        raise ConfigError(f"--context {options.context} is longer than the model's {most} positions")
    return options.context or min(most, DEFAULT_CONTEXT)


def _policy(bundle: Bundle, config: ModelConfig, options: EngineOptions) -> Policy:
    """With no history.  Raises ConfigError or TraceError when it cannot be had, or belongs to another bundle."""
    layers = tuple(layer.layer for layer in bundle.expert_layers)
    geometry = Geometry(layers, config.num_experts, bundle.manifest.experts_identity)
    spec = chosen(options.policy, bundle.path)
    try:
        return policy_maker(spec, geometry)().together()
    except TraceError as error:
        if spec == options.policy:
            raise
        raise TraceError(f"{error}; without the file the bundle runs with --policy {DEFAULT}") from error


def _recorder(
    bundle: Bundle, config: ModelConfig, per_token: int, options: EngineOptions
) -> TraceWriter | None:
    if options.record_trace is None:
        return None
    layers = [layer.layer for layer in bundle.expert_layers]
    if not layers:
        raise ConfigError(f"{bundle.path}: --record-trace: the model has no routed experts to record")
    identity = bundle.manifest.experts_identity
    return TraceWriter(options.record_trace, layers, config.num_experts, per_token, identity)


def _cache(
    bundle: Bundle, reader: NativeReader, arena: SlotArena, policy: Policy, per_token: int, verify: bool
) -> ExpertCache:
    layers = bundle.expert_layers
    stripes = len(bundle.experts_dirs)
    files = {layer.layer: (1 + i * stripes, layer.record_nbytes, stripes) for i, layer in enumerate(layers)}
    checksums: Any = {record.layer: record.xxh3 for record in bundle.manifest.experts} if verify else None
    experts = sum(layer.count for layer in layers)
    if arena.count >= experts:
        policy = Fifo()
    return ExpertCache(
        reader, arena, policy, files, experts_per_token=per_token, checksums=checksums, experts=experts
    )


def bundle_identity(bundle: Bundle) -> str:
    """32 hexadecimal digits that any change of the bundle's content changes."""
    return xxhash.xxh3_128_hexdigest((bundle.path / MANIFEST_FILE).read_bytes())


def _warming(bundle: Bundle, options: EngineOptions) -> Warming:
    identity = bundle_identity(bundle)
    experts = {layer.layer: layer.count for layer in bundle.expert_layers}
    return Warming(usage_path(options.usage_file, identity), identity, experts)


def _token_nbytes(bundle: Bundle, per_token: int) -> int:
    """Bytes of weights that one decoded token reads: all resident ones and its experts."""
    resident = sum(
        info.nbytes
        for info in map(bundle.tensor, bundle.tensor_names())
        if info.name != "embed_tokens" or "lm_head" not in bundle
    )
    routed: U8 | int = sum(per_token * layer.ffn.nbytes for layer in bundle.expert_layers)
    return resident + int(routed)
