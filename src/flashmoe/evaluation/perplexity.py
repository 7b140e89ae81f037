"""Perplexity of a text: exp of the mean of -log p(token | the tokens before it in its window)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from flashmoe.engine.engine import Engine
from flashmoe.evaluation.scoring import log_probabilities
from flashmoe.evaluation.windows import Window

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Perplexity:
    """error: standard error of the perplexity, from the spread of the tokens' logarithms as if independent."""

    perplexity: float
    error: float
    nats_per_token: float
    scored_tokens: int
    windows: int


def perplexity(engine: Engine, windows: Sequence[Window], progress: Progress | None = None) -> Perplexity:
    """Score all windows; progress(tokens done, tokens in all) after each.  Raises what Engine.feed() raises."""
    total = sum(len(window.ids) for window in windows)
    done, logs = 0, []
    for window in windows:
        logs.append(log_probabilities(engine, window.ids, window.first_scored))
        done += len(window.ids)
        if progress is not None:
            progress(done, total)
    losses = -np.concatenate(logs)
    mean = float(losses.mean())
    value = math.exp(mean)
    error = value * float(losses.std()) / math.sqrt(len(losses))
    return Perplexity(value, error, mean, len(losses), len(windows))
