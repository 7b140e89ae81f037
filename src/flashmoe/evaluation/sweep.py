"""What fewer bits and fewer experts cost, and what they bring: quality and speed of one model in many forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flashmoe.bench.measure import spread
from flashmoe.bundle.progress import Progress
from flashmoe.chat.llm import LLM
from flashmoe.convert import convert
from flashmoe.convert.bits import parse_bits
from flashmoe.evaluation.divergence import Divergence, divergence
from flashmoe.evaluation.stored_logits import StoredLogits
from flashmoe.evaluation.windows import Window

_PROMPT_TOKENS = 32
_DECODE_TOKENS = 48

Bar = Callable[[str], AbstractContextManager[Progress]]
Open = Callable[[Path, int | None], LLM]  # of a bundle with so many experts a token


@dataclass(frozen=True)
class SweepOptions:
    """bits: of each variant, as for convert(), the best first; experts: a token, None for the model's own."""

    bits: Sequence[str]
    experts: Sequence[int | None]
    fit: str = "squares"
    repeats: int = 5


@dataclass
class Variant:
    """One form of the model and what was measured of it.

    nbytes: of the bundle's weights; token_nbytes: of weights and state that a decoded token reads; tok_s: of decoding,
    one a turn.
    """

    bits: str
    experts_per_token: int
    bundle: Path
    nbytes: int
    token_nbytes: int = 0
    quality: Divergence | None = None
    tok_s: list[float] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        """JSON values."""
        assert self.quality is not None
        quality = asdict(self.quality)
        return {
            "bits": self.bits,
            "experts_per_token": self.experts_per_token,
            "nbytes": self.nbytes,
            "token_nbytes": self.token_nbytes,
            "perplexity": math.exp(quality["nats_per_token"]),
            **{key: quality[key] for key in ("mean_kl", "p99_kl", "max_kl", "same_top", "positions")},
            "tok_s": spread(self.tok_s),
        }


def default_experts(native: int) -> list[int]:
    """The model's own number and fewer: all of up to four, then halves."""
    counts = {native, *range(1, min(native, 4) + 1)}
    while native > 4:
        native //= 2
        counts.add(native)
    return sorted(counts, reverse=True)


def sweep(
    source: Path,
    folder: Path,
    options: SweepOptions,
    open_bundle: Open,
    windows_of: Callable[[LLM], Sequence[Window]],
    bar: Bar,
) -> list[dict[str, Any]]:
    """Reports of all variants, those of the first bits first; ``folder`` is filled with their bundles.

    Divergence is that from the first bits with the model's own number of experts.  Speeds are measured at the end, in
    turns, so that a machine that slows down does so for all.  Raises what convert(), LLM and Engine.feed() raise.
    """
    variants = _convert(source, folder, options, open_bundle, bar)
    with open_bundle(variants[0].bundle, None) as llm:
        windows = windows_of(llm)
        with bar("reference") as progress:
            reference = StoredLogits(folder / "reference.logits", llm.engine, windows, progress)
    for variant in variants:
        with open_bundle(variant.bundle, variant.experts_per_token) as llm:
            with bar(f"{variant.bits} bit, {variant.experts_per_token} experts") as progress:
                variant.quality = divergence(llm.engine, reference, windows, progress)
            variant.token_nbytes = llm.engine.token_nbytes
    _measure_speeds(variants, windows, options.repeats, open_bundle, bar)
    return [variant.report() for variant in variants]


def _convert(source: Path, folder: Path, options: SweepOptions, open_bundle: Open, bar: Bar) -> list[Variant]:
    wanted = [parse_bits(bits) for bits in options.bits]  # every complaint before the first conversion
    variants: list[Variant] = []
    experts: list[int | None] = list(options.experts)
    for i, bits in enumerate(wanted):
        with bar(f"converting to {bits} bit") as progress:
            report = convert(source, folder / f"{i}", bits=bits, fit=options.fit, progress=progress)
        if not experts or None in experts:
            with open_bundle(report.path, None) as llm:
                native = llm.native_experts_per_token
            experts = [native] if experts else [*default_experts(native)]
        variants += [Variant(str(bits), count or 0, report.path, report.nbytes) for count in experts]
    return variants


def _measure_speeds(
    variants: Sequence[Variant], windows: Sequence[Window], repeats: int, open_bundle: Open, bar: Bar
) -> None:
    room = len(windows[0].ids)  # of the context, which may be as short as a window
    prompt = windows[0].ids[: min(_PROMPT_TOKENS, room // 2)]
    tokens = min(_DECODE_TOKENS, room - len(prompt))
    with bar("measuring speed") as progress:
        for turn in range(repeats):
            for i, variant in enumerate(variants):
                with open_bundle(variant.bundle, variant.experts_per_token) as llm:
                    params = llm.sampling_params(temperature=0.0, max_tokens=tokens)
                    for _ in range(2):  # the first one fills the pool
                        for _ in llm.engine.generate_ids(prompt, params, set()):
                            pass
                    variant.tok_s.append(llm.stats()["decode_tok_s"])
                progress(turn * len(variants) + i + 1, repeats * len(variants))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The reports as Markdown."""
    lines = [
        "| bits | experts a token | bundle | bytes a token | perplexity | KL | same top token | tok/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['bits']} | {row['experts_per_token']} | {row['nbytes'] / 1e6:.1f} MB"
        f" | {row['token_nbytes'] / 1e6:.1f} MB | {row['perplexity']:.2f} | {row['mean_kl']:.4f}"
        f" | {row['same_top']:.1%} | {row['tok_s']['median']:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)
