"""What training needs of a trace: use of every expert as arrays, and when it is used next."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flashmoe.store.trace import Trace

F32 = NDArray[np.float32]
NEVER = 1 << 30


def use_matrix(trace: Trace, layer: int) -> F32:
    """[steps, E]: 1 where the step used the expert in the layer (an index); float32."""
    starts = trace.step_starts()
    step_of = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, trace.tokens]))
    used: F32 = np.zeros((len(starts), trace.experts), np.float32)
    used[step_of[:, None], trace.expert_ids[:, layer].astype(np.intp)] = 1
    return used


def decayed(used: F32, decay: float) -> F32:
    """[steps, E]: sum over the steps so far of decay ** age * used."""
    if decay == 0:
        return used.copy()
    result = np.empty_like(used)
    total = np.zeros(used.shape[1], np.float32)
    for i, row in enumerate(used):
        total *= decay
        total += row
        result[i] = total
    return result


def shifted(values: F32, steps: int) -> F32:
    """The values of so many steps before; zeros where there were none."""
    if steps == 0:
        return values
    result = np.zeros_like(values)
    result[steps:] = values[:-steps]
    return result


def distances(used: F32) -> NDArray[np.int64]:
    """[steps, E]: how many steps later the expert is used next (1: by the next step); NEVER if it is not."""
    steps, experts = used.shape
    coming = np.full(experts, NEVER, np.int64)
    result = np.empty((steps, experts), np.int64)
    for i in range(steps - 1, -1, -1):
        result[i] = np.where(coming == NEVER, NEVER, coming - i)
        coming[used[i] > 0] = i
    return result


def counts(trace: Trace) -> F32:
    """[layers, E]: steps that used each expert."""
    return np.stack([use_matrix(trace, layer).sum(0) for layer in range(len(trace.layers))])
