"""describe(): what a bundle is, or what a checkpoint or a bare config would become."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flashmoe.bundle.codecs import Codec, FfnLayout, TileCodec
from flashmoe.bundle.manifest import JOURNAL_FILE, MANIFEST_FILE, RESIDENT_FILE
from flashmoe.bundle.reader import Bundle
from flashmoe.checkpoint import Checkpoint
from flashmoe.convert.bits import Bits, parse_bits
from flashmoe.convert.outline import make_outline
from flashmoe.convert.plan import Wishes, make_plan
from flashmoe.convert.sources import Sources
from flashmoe.convert.traffic import Tensor, stored_nbytes, token_traffic
from flashmoe.errors import CheckpointError, ConfigError
from flashmoe.models.fit import check_fit
from flashmoe.models.registry import find_family

# No checkpoint has these: a folder with one of them is a bundle, if perhaps an unfinished one.
_BUNDLE_FILES = (MANIFEST_FILE, RESIDENT_FILE, JOURNAL_FILE)


def describe(path: Path | str, *, bits: Bits | str | int | None = None) -> dict[str, Any]:
    """Facts about a bundle directory, a checkpoint (directory or GGUF file) or a config.json, ready for JSON.

    Keys: kind (bundle | checkpoint | config), experts_dirs (of a striped bundle only),
    model_type, layers, attention_layers, hidden_size, vocab_size,
    experts, experts_per_token, expert_layers, codecs (label -> number of matrices), resident_nbytes,
    embedding_nbytes (an untied embedding, of which only rows are read; not part of resident_nbytes),
    expert_nbytes (all), record_nbytes (one expert, the largest), token_expert_nbytes (experts of one token), traffic
    (token_traffic()),
    skipped (prefix, tensors, nbytes), unknown (names), lossless, note.  For a checkpoint or config they are
    what `convert` with ``bits`` would give.  Raises FlashmoeError as opening it does.
    """
    path, wanted = Path(path), parse_bits(bits)
    if path.suffix == ".gguf":
        return _describe_checkpoint(Checkpoint.open(path), wanted)
    if path.is_file():
        return _describe_config(path, wanted)
    if any((path / name).exists() for name in _BUNDLE_FILES):
        return _describe_bundle(Bundle.open(path))
    if not path.is_dir():
        raise CheckpointError(
            f"{path} does not exist: give a bundle, a checkpoint directory or a config.json"
        )
    return _describe_checkpoint(Checkpoint.open(path), wanted)


def _describe_bundle(bundle: Bundle) -> dict[str, Any]:
    manifest, family = bundle.manifest, find_family(bundle.config)
    check_fit(bundle, family, family.config(bundle.config))
    tensors = [(name, record.codec, record.shape) for name, record in manifest.tensors.items()]
    return {
        "kind": "bundle",
        **({"experts_dirs": [str(one.resolve()) for one in bundle.experts_dirs]} if manifest.stripes else {}),
        **_model_facts(bundle.config),
        **_size_facts(
            tensors, [layer.ffn for layer in bundle.expert_layers], manifest.expert_count, bundle.config
        ),
        "skipped": [dict(item) for item in manifest.skipped],
        "unknown": [],
        "lossless": manifest.lossless,
        "note": manifest.quantization_note,
    }


def _describe_checkpoint(checkpoint: Checkpoint, bits: Bits) -> dict[str, Any]:
    plan = make_plan(checkpoint, Wishes(bits))
    tensors = [(item.name, item.codec, tuple(item.shape)) for item in plan.resident]
    count = plan.experts[0].count if plan.experts else 0
    return {
        "kind": "checkpoint",
        **_model_facts(checkpoint.config),
        **_size_facts(tensors, [item.layout for item in plan.experts], count, checkpoint.config),
        "skipped": [
            {"prefix": s.prefix, "tensors": s.tensors, "nbytes": s.nbytes} for s in checkpoint.skipped
        ],
        "unknown": Sources(checkpoint, plan, consume=False).unknown,
        "lossless": plan.lossless,
        "note": plan.note,
    }


def _describe_config(path: Path, bits: Bits) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read {path} ({error}): give the config.json of a model") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} is no JSON object: give the config.json of a model")
    outline = make_outline(config, bits)
    tensors = [(slot.name, slot.codec, slot.shape) for slot in outline.resident]
    layouts = [] if outline.ffn is None else [outline.ffn] * len(outline.expert_layers)
    return {
        "kind": "config",
        **_model_facts(config),
        **_size_facts(tensors, layouts, outline.expert_count, config),
        "skipped": [],
        "unknown": [],
        "lossless": False,
        "note": "sizes after conversion from floats",
    }


def _model_facts(raw: Mapping[str, Any]) -> dict[str, Any]:
    family = find_family(raw)
    config = family.config(raw)
    return {
        "model_type": family.model_type,
        "layers": config.num_hidden_layers,
        "attention_layers": family.architecture(config).attention_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "experts": config.num_experts,
        "experts_per_token": config.num_experts_per_tok,
    }


def _size_facts(
    tensors: Sequence[Tensor], layouts: Sequence[FfnLayout], count: int, raw: Mapping[str, Any]
) -> dict[str, Any]:
    config = find_family(raw).config(raw)
    sizes = {name: stored_nbytes(codec, shape) for name, codec, shape in tensors}
    codecs = Counter(label for _, codec, _ in tensors for label in _labels(codec))
    for layout in layouts:
        codecs.update({label: n * count for label, n in Counter(_labels(layout)).items()})
    embedding = 0 if config.tie_word_embeddings else sizes["embed_tokens"]
    records = [layout.record_nbytes for layout in layouts]
    return {
        "expert_layers": len(layouts),
        "codecs": dict(sorted(codecs.items())),
        "resident_nbytes": sum(sizes.values()) - embedding,
        "embedding_nbytes": embedding,
        "expert_nbytes": sum(records) * count,
        "record_nbytes": max(records, default=0),
        "token_expert_nbytes": sum(records) * config.num_experts_per_tok,
        "traffic": token_traffic(tensors, layouts),
    }


def _labels(codec: Codec) -> list[str]:
    """One label per matrix: ``4 bit, group 64``, or ``4 bit with a table, group 32``."""
    if isinstance(codec, FfnLayout):
        return 2 * _labels(codec.gate_up) + _labels(codec.down)
    if not isinstance(codec, TileCodec):
        return [codec.dtype]
    return [f"{codec.bits} bit{' with a table' if codec.table else ''}, group {codec.group}"]
