"""Alternating pairs of the default and an experiment, the same tokens in both, and the ratio of their speeds."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from flashmoe.bench.experiments.arm import ArmOptions
from flashmoe.bench.experiments.base import UnavailableError
from flashmoe.bench.experiments.catalog import Experiment
from flashmoe.bench.experiments.compressed import write_copy
from flashmoe.bench.measure import spread
from flashmoe.bench.process import run_module
from flashmoe.bundle.reader import Bundle
from flashmoe.engine.loading import reader_files
from flashmoe.engine.tokenizer import TextTokenizer
from flashmoe.errors import ConfigError, FlashmoeError

_POOL_SHARE = 0.25  # of the experts, when no budget is given: the demo model would fit into any
_MOST_COPIED = 3 << 29  # 1.5 GiB of records: what a compressed copy may have before it is compressed
_ENOUGH_COPIED = 2  # tokens: one before the clock starts

Progress = Callable[[str], None]


@dataclass(frozen=True)
class CompareOptions:
    """What is compared; text: a file whose tokens are fed, None for tokens drawn at random from `seed`."""

    bundle: Path
    memory_bytes: int | None = None
    warm: int = 8
    tokens: int = 16
    repeats: int = 3
    text: Path | None = None
    scratch: Path | None = None
    seed: int = 1


def compare(options: CompareOptions, experiments: Sequence[Experiment], progress: Progress) -> dict[str, Any]:
    """Rows of all experiments, and those that could not run; JSON values.

    Raises FlashmoeError when an experiment's logits are not those of the default.
    """
    default = _default_arm(options)
    progress("reference")
    reference = _run(replace(default, record=True))
    rows, skipped = [], []
    for experiment in experiments:
        reason = experiment.missing()
        try:
            if reason is None:
                rows.append(_row(experiment, options, default, reference, progress))
        except UnavailableError as error:
            reason = str(error)
        if reason is not None:
            skipped.append({"name": experiment.name, "reason": reason})
    kept = ("slots", "experts", "io", "budget_bytes")
    return {key: reference[key] for key in kept} | {"results": rows, "skipped": skipped}


def _default_arm(options: CompareOptions) -> ArmOptions:
    bundle = Bundle.open(options.bundle)
    slots = None
    if options.memory_bytes is None:
        slots = max(2, int(_POOL_SHARE * sum(layer.count for layer in bundle.expert_layers)))
    ids = _ids(options, bundle)
    return ArmOptions(str(options.bundle), options.memory_bytes, slots, None, ids, options.warm)


def _ids(options: CompareOptions, bundle: Bundle) -> tuple[int, ...]:
    count = options.warm + options.tokens
    if options.text is None:
        rng = np.random.default_rng(options.seed)
        return tuple(rng.integers(0, bundle.text_config["vocab_size"], count).tolist())
    text = options.text.read_text(encoding="utf-8", errors="replace")[: 64 * count]
    ids = TextTokenizer.open(options.bundle).encode(text)[:count]
    if len(ids) < count:
        raise ConfigError(f"{options.text}: {len(ids)} tokens, {count} are needed: give a longer --text")
    return tuple(ids)


def _row(
    experiment: Experiment,
    options: CompareOptions,
    default: ArmOptions,
    reference: dict[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    with _prepared(experiment, options, default, reference, progress) as (plain, changed):
        pairs = []
        for repeat in range(options.repeats):
            progress(f"{experiment.name}, pair {repeat + 1} of {options.repeats}")
            arms = (plain, changed) if repeat % 2 == 0 else (changed, plain)  # no advantage of being second
            done = {arm.experiment: _run(arm) for arm in arms}
            for arm in done.values():
                _check(experiment, arm, reference)
            pairs.append((done[None], done[experiment.name]))
    return _summary(experiment, len(plain.ids) - plain.warm, pairs)


def _check(experiment: Experiment, arm: dict[str, Any], reference: dict[str, Any]) -> None:
    got, wanted = arm["logits_xxh3"], reference["logits_xxh3"]
    for i, (mine, theirs) in enumerate(zip(got, wanted, strict=False)):
        if mine != theirs:
            raise FlashmoeError(
                f"{experiment.name}: logits of token {i} differ from the default's: report this as a bug"
            )


def _summary(
    experiment: Experiment, tokens: int, pairs: list[tuple[dict[str, Any], dict[str, Any]]]
) -> dict[str, Any]:
    plain, changed = [pair[0] for pair in pairs], [pair[1] for pair in pairs]

    def middle(arms: list[dict[str, Any]], key: str) -> float | None:
        values = [arm[key] for arm in arms]
        return None if None in values else median(values)

    return {
        "name": experiment.name,
        "stands_for": experiment.stands_for,
        "tokens": tokens,
        "tok_s": spread([arm["tok_s"] for arm in changed]),
        "default_tok_s": spread([arm["tok_s"] for arm in plain]),
        "ratio": spread([two["tok_s"] / one["tok_s"] for one, two in pairs]),
        "bytes_per_token": middle(changed, "bytes_per_token"),
        "default_bytes_per_token": middle(plain, "bytes_per_token"),
        "hit_rate": middle(changed, "hit_rate"),
        "stall_share": middle(changed, "stall_share"),
        "page_cache_bytes": middle(changed, "page_cache_bytes"),
        "process_bytes": middle(changed, "process_bytes"),
        "default_process_bytes": middle(plain, "process_bytes"),
        "peak_memory_bytes": middle(changed, "peak_memory_bytes"),
        "same_logits": True,
        "note": changed[-1]["note"],
    }


@contextmanager
def _prepared(
    experiment: Experiment,
    options: CompareOptions,
    default: ArmOptions,
    reference: dict[str, Any],
    progress: Progress,
) -> Iterator[tuple[ArmOptions, ArmOptions]]:
    """Both arms; one that reads compressed records has a copy of those that its tokens need, as long as it lasts."""
    changed = replace(default, experiment=experiment.name)
    if experiment.codec is None:
        yield default, changed
        return
    count = _copied_tokens(reference)
    warm = min(default.warm, count // 2)
    default = replace(default, ids=default.ids[:count], warm=warm)
    with tempfile.TemporaryDirectory(prefix="flashmoe-experiments-", dir=options.scratch) as folder:
        progress(f"{experiment.name}, compressing")
        paths = reader_files(Bundle.open(options.bundle))
        places = [tuple(place) for place in reference["places"][: reference["places_ends"][count - 1]]]
        write_copy(paths, places, experiment.codec, Path(folder))
        yield default, replace(default, experiment=experiment.name, scratch=folder)


def _copied_tokens(reference: dict[str, Any]) -> int:
    """How many of the tokens can be processed with a copy of at most _MOST_COPIED bytes of records."""
    seen, nbytes, begin = set[tuple[int, ...]](), 0, 0
    for token, end in enumerate(reference["places_ends"]):
        fresh = {tuple(place) for place in reference["places"][begin:end]} - seen
        nbytes += sum(place[2] for place in fresh)
        if nbytes > _MOST_COPIED:
            if token < _ENOUGH_COPIED:
                raise UnavailableError(
                    "the records of two tokens are too many to copy: try a bundle with fewer layers"
                )
            return token
        seen |= fresh
        begin = end
    return len(reference["places_ends"])


def _run(arm: ArmOptions) -> dict[str, Any]:
    report = run_module("flashmoe.bench.experiments.arm", asdict(arm))
    if "unavailable" in report:
        raise UnavailableError(report["unavailable"])
    return report
