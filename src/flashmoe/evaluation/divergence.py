"""How far a bundle is from a better one of the same model, token by token of a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from flashmoe.engine.engine import Engine
from flashmoe.errors import ConfigError
from flashmoe.evaluation.perplexity import Progress
from flashmoe.evaluation.scoring import F32, F64, log_softmax, logit_blocks
from flashmoe.evaluation.windows import Window


@dataclass(frozen=True)
class Divergence:
    """Over the scored positions of all windows.

    mean_kl, p99_kl, max_kl: Kullback-Leibler divergence of the bundle from the reference, sum p_ref (log p_ref -
    log p), in nats.  same_top: share of positions with the same most likely token.  nats_per_token, reference_nats:
    the mean of -log p(token) under either.
    """

    mean_kl: float
    p99_kl: float
    max_kl: float
    same_top: float
    nats_per_token: float
    reference_nats: float
    positions: int


class Reference(Protocol):
    """Where the better logits come from."""

    def rows(self, most: int) -> int:
        """Rows of a block, at most ``most``."""

    def blocks(self, window: Window, rows: int) -> Iterator[tuple[int, F32]]:
        """As logit_blocks() of the window from its first scored token on."""


class LiveReference:
    """An engine that computes them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def rows(self, most: int) -> int:
        """See Reference."""
        return min(most, self._engine.logit_rows)

    def blocks(self, window: Window, rows: int) -> Iterator[tuple[int, F32]]:
        """See Reference."""
        return logit_blocks(self._engine, window.ids, window.first_scored, rows)


def divergence(
    engine: Engine, reference: Reference, windows: Sequence[Window], progress: Progress | None = None
) -> Divergence:
    """Feed both all windows.  Raises what Engine.feed() raises, ConfigError when their vocabularies differ."""
    total = sum(len(window.ids) for window in windows)
    done = 0
    found: list[F64] = []
    for window in windows:
        found += _window(engine, reference, window)
        done += len(window.ids)
        if progress is not None:
            progress(done, total)
    kl, same, own, better = np.concatenate(found, axis=1)
    return Divergence(
        float(kl.mean()),
        float(np.quantile(kl, 0.99)),
        float(kl.max()),
        float(same.mean()),
        float(own.mean()),
        float(better.mean()),
        len(kl),
    )


def _window(engine: Engine, reference: Reference, window: Window) -> Iterator[F64]:
    """[4, rows]: divergence, whether the top tokens agree, -log p of the token under the bundle and the reference."""
    rows = reference.rows(engine.logit_rows)
    both = zip(
        logit_blocks(engine, window.ids, window.first_scored, rows),
        reference.blocks(window, rows),
        strict=True,
    )
    for (begin, logits), (_, wanted) in both:
        if logits.shape != wanted.shape:
            raise ConfigError(
                f"the bundles have vocabularies of {logits.shape[1]} and {wanted.shape[1]} tokens: "
                "compare two of one model"
            )
        for (part, own), (_, better) in zip(log_softmax(logits), log_softmax(wanted), strict=True):
            tokens = np.array(window.ids[begin + part.start : begin + part.stop])
            at = np.arange(len(tokens)), tokens
            kl = (np.exp(better) * (better - own)).sum(axis=1)
            same = own.argmax(axis=1) == better.argmax(axis=1)
            yield np.stack([kl, same, -own[at], -better[at]])
