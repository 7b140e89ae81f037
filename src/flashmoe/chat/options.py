"""How a bundle is loaded: the options of LLM in the words of a user, and what the engine makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from flashmoe.bundle.reader import Bundle
from flashmoe.engine.engine import EngineOptions
from flashmoe.errors import ConfigError
from flashmoe.store.policies.registry import AUTO as DEFAULT_POLICY
from flashmoe.types import parse_size


class LoadOptions(TypedDict, total=False):
    """Keyword arguments of LLM; each may be left out.  Only those marked (*) change the output.

    memory: ceiling of the whole process in bytes or like "6GiB"; "auto" (as None) takes what the machine and its
    control groups can spare.
    context: longest prompt and answer together, in tokens; None is the model's own or 8,192.
    threads: compute threads; None is one for each processor.
    experts_per_token: (*) other than the model's own number.
    activations: "int8", or (*) "f32" for the accuracy oracle.
    kv_cache: keys and values as "f16", (*) "int8" with half the memory, or "f32"; None is "f16", and "f32" with
    activations "f32".
    io: "auto", "direct" or "buffered".
    expert_slots: how many experts to keep in memory, as a number or a share like "25%"; None is as many as the
    memory allows.
    lookahead: "auto" reads the likely experts of the next layers ahead while that helps; or "on", "off".
    sequences: how many a scheduler may process side by side, each with its own context (flashmoe serve).
    prefix_cache: memory set apart for its snapshots of sequences, in bytes or like "500MiB".
    verify_reads: compare every weight with its checksum as it is read; damage is then a ReadError.
    logit_rows: tokens whose logits an evaluation looks at together; counted by the memory plan.
    experts_dirs: of a striped bundle, directories that are not where its links lead, in any order.
    usage_file: a file that remembers which experts are used, from run to run; at the next start those used most are
    read while nobody waits.  "auto" keeps it in the user's cache directory; "off", as left out, neither reads nor
    writes one.
    policy: which expert leaves the pool when a slot is needed: "auto" (the trained one in the bundle, else "duel"),
    "lru" and others, or "learned:FILE" of `flashmoe cache train` (docs/policies.md).
    record_trace: file that gets what the routers picked, when the model is closed (docs/format.md, section 10).
    """

    memory: str | int | None
    context: int | None
    threads: int | None
    experts_per_token: int | None
    activations: str
    kv_cache: str | None
    io: str
    expert_slots: int | str | None
    lookahead: str
    sequences: int
    prefix_cache: str | int | None
    verify_reads: bool
    logit_rows: int
    experts_dirs: Sequence[str | Path]
    usage_file: str | Path
    policy: str
    record_trace: str | Path | None


def engine_options(given: LoadOptions, bundle: Bundle) -> EngineOptions:
    """Sizes as bytes, shares as numbers; raises ConfigError for what cannot be read."""
    memory, prefix_cache = given.get("memory"), given.get("prefix_cache")
    record_trace = given.get("record_trace")
    return EngineOptions(
        memory_bytes=None if memory in (None, "auto") else parse_size(memory),
        context=given.get("context"),
        threads=given.get("threads"),
        experts_per_token=given.get("experts_per_token"),
        activations=given.get("activations", "int8"),
        kv_cache=given.get("kv_cache"),
        io=given.get("io", "auto"),
        expert_slots=_slot_count(given.get("expert_slots"), bundle),
        lookahead=given.get("lookahead", "auto"),
        sequences=given.get("sequences", 1),
        prefix_cache_bytes=0 if prefix_cache is None else parse_size(prefix_cache),
        verify_reads=given.get("verify_reads", False),
        logit_rows=given.get("logit_rows", 1),
        experts_dirs=tuple(map(Path, given.get("experts_dirs", ()))),
        usage_file=given.get("usage_file", "off"),
        policy=given.get("policy", DEFAULT_POLICY),
        record_trace=None if record_trace is None else Path(record_trace),
    )


def _slot_count(wanted: int | str | None, bundle: Bundle) -> int | None:
    """Slots for a number, or for a share of all experts of all layers, rounded down but at least one."""
    if not isinstance(wanted, str):
        return wanted
    text = wanted.strip()
    digits = text.removesuffix("%")
    if not digits.isdecimal() or int(digits) < 1:
        raise ConfigError(f"cannot read the number of expert slots {wanted!r}: write it like 512 or 25%")
    if digits == text:
        return int(digits)
    experts = sum(layer.count for layer in bundle.expert_layers)
    return max(1, experts * int(digits) // 100)
