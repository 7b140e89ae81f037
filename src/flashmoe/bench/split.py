"""Which sequences of a trace to train on, and which to judge by."""

from __future__ import annotations

import numpy as np

from flashmoe.errors import ConfigError
from flashmoe.store.trace import Trace

PARTS = ("all", "train", "test")
_CYCLE, _TRAINED = 5, 3  # three sequences of five are trained on


def part_of(trace: Trace, part: str) -> Trace:
    """Of each domain's sequences in their order, the first three of every five ("train"), or the others ("test").

    Raises ConfigError when there are too few sequences.
    """
    if part == "all":
        return trace
    starts = trace.sequence_starts()
    lengths = np.diff(np.r_[starts, trace.tokens])
    domains = np.zeros(len(starts), np.int64) if trace.domains is None else trace.domains[starts]
    rank = np.zeros(len(starts), np.int64)
    for domain in np.unique(domains):
        mine = np.flatnonzero(domains == domain)
        rank[mine] = np.arange(len(mine))
    chosen = (rank % _CYCLE < _TRAINED) == (part == "train")
    if not chosen.any():
        raise ConfigError(f"{trace.path}: {len(starts)} sequences have no {part} part: use --part all")
    return trace.select(np.repeat(chosen, lengths))
