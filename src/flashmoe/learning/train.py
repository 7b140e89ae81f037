"""From a trace to a policy's file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from flashmoe.errors import ConfigError, TraceError
from flashmoe.learning.forecast import ForecastOptions, fit_forecast
from flashmoe.learning.network import NetworkOptions, fit_network
from flashmoe.learning.pairwise import fit_pairwise
from flashmoe.learning.targets import counts
from flashmoe.store.policies.learned_file import KINDS, Learned, Weights
from flashmoe.store.trace import Trace

# Fewer decoded tokens teach less than the experts' own history tells (docs/decisions/010).
FEWEST_TOKENS = 256


def train(
    trace: Trace,
    kind: str = "forecast",
    *,
    horizon: float = ForecastOptions.horizon,
    cold: bool = False,
    progress: Callable[[int], None] = lambda layer: None,
) -> Learned:
    """Train a policy on a trace's decoded tokens.

    kind: a key of KINDS; horizon: see ForecastOptions; cold: see NetworkOptions.  progress hears each layer that is
    done.  Raises ConfigError for unknown kinds and cold ones of the others, TraceError when there is too little to
    learn from.
    """
    if cold and kind != "flashmoe-net":
        raise ConfigError(f"--cold is for --kind flashmoe-net: a {kind} forgets what is long ago anyway")
    trace = trace.decoding()
    if trace.tokens < FEWEST_TOKENS:
        raise TraceError(
            f"{trace.path}: {trace.tokens} decoded tokens are too few to learn from: record at least {FEWEST_TOKENS}"
        )
    weights: Weights
    if kind == "forecast":
        weights = fit_forecast(trace, ForecastOptions(horizon=horizon), progress)
    elif kind == "flashmoe-net":
        weights = fit_network(trace, NetworkOptions(cold=cold), progress)
    elif kind == "pairwise":
        weights = fit_pairwise(trace, progress=progress)
    else:
        raise ConfigError(f"unknown --kind {kind!r}: choose one of {', '.join(KINDS)}")
    about: dict[str, Any] = {"trace": trace.path.name, "tokens": trace.tokens}
    about |= {"sequences": len(np.unique(trace.sequences))}
    return Learned(trace.model, trace.layers, trace.experts, counts(trace), weights, about)
