"""Training the pairwise ranker: logistic regression on differences of features (Burges et al., RankNet, ICML 2005)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from flashmoe.learning.targets import distances, use_matrix
from flashmoe.store.policies.pairwise import FEATURES, History, PairwiseWeights
from flashmoe.store.trace import Trace

F32 = NDArray[np.float32]
_PAIRS = 400_000  # in all; more change no digit of the hit rate that is printed
_NEWTON_STEPS = 8
_RIDGE = 1e-4  # of the mean curvature
_FARTHEST = 64  # steps: which of two experts comes first beyond that concerns no pool


def fit_pairwise(
    trace: Trace, seed: int = 0, progress: Callable[[int], None] = lambda layer: None
) -> PairwiseWeights:
    """Train on pairs drawn from all layers; deterministic for a seed."""
    rng = np.random.default_rng(seed)
    differences: list[F32] = []
    for layer in range(len(trace.layers)):
        used = use_matrix(trace, layer)
        differences.append(_differences(used, _PAIRS // len(trace.layers), rng))
        progress(layer)
    x = np.concatenate(differences)
    scale = x.std(0) + 1e-6
    weights = _logistic((x / scale).astype(np.float64)) / scale
    return PairwiseWeights(weights.astype(np.float32))


def _differences(used: F32, pairs: int, rng: np.random.Generator) -> F32:
    """[pairs, FEATURES]: features of the expert that is used sooner, less those of the other."""
    steps, experts = used.shape
    history, due = History(experts), np.minimum(distances(used), _FARTHEST)
    each = max(1, pairs // steps)
    result = []
    for i, row in enumerate(used):
        history.touch(np.flatnonzero(row).tolist())
        a, b = rng.integers(0, experts, (2, each))
        unequal = due[i, a] != due[i, b]
        a, b = a[unequal], b[unequal]
        sign = np.where(due[i, a] < due[i, b], 1, -1)
        features = history.features()
        result.append((features[:, a] - features[:, b]).T * sign[:, None])
    return np.concatenate(result).astype(np.float32)


def _logistic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights that make x @ weights positive, by Newton's method."""
    weights = np.zeros(FEATURES)
    for _ in range(_NEWTON_STEPS):
        right = 1 / (1 + np.exp(-x @ weights))
        curvature = (x * (right * (1 - right))[:, None]).T @ x
        ridge = _RIDGE * np.trace(curvature) / FEATURES
        gradient = x.T @ (1 - right) - ridge * weights
        weights = weights + np.linalg.solve(curvature + ridge * np.eye(FEATURES), gradient)
    return weights
