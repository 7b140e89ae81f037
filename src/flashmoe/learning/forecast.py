"""Fitting a Forecast (store/policies/forecast.py): ridge regression, then the best approximation of low rank.

Closed form, so the same trace gives the same policy.  Reduced-rank regression: Izenman, Journal of Multivariate
Analysis 5(2), 1975.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashmoe.learning.targets import decayed, distances, shifted, use_matrix
from flashmoe.store.policies.forecast import NEIGHBOURS, ForecastWeights
from flashmoe.store.trace import Trace

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
_HELD_OUT = 0.2  # of the steps, the last ones, to choose the ridge by
_ROWS = 2048  # of the regression at a time: 25 MB of them with 512 experts


@dataclass(frozen=True)
class ForecastOptions:
    """Chosen on the OLMoE trace (docs/decisions/010).

    horizon: in steps; small ones tell the next few steps apart, large ones the far ones.  rank: at most the experts of
    a layer.  ridges: of inputs scaled to variance 1; each layer takes the one that forecasts best what it was not
    fitted to, and so trusts a short trace little.
    """

    decays: tuple[float, ...] = (0.0, 0.5, 0.8, 0.95)
    horizon: float = 5.0
    ridges: tuple[float, ...] = (1e3, 3e3, 1e4, 3e4, 1e5, 1e6)
    rank: int = 32


def fit_forecast(
    trace: Trace, options: ForecastOptions, progress: Callable[[int], None] = lambda layer: None
) -> ForecastWeights:
    """Train on all decoded tokens of a trace; progress hears each layer that is done.

    O(steps ((S + 2) E)^2) a layer.
    """
    experts, layers = trace.experts, len(trace.layers)
    rank, decays = min(options.rank, experts), options.decays
    columns = len(decays) + NEIGHBOURS
    direct = _fit_direct(trace, options)
    inputs = np.zeros((layers, experts, columns, rank), np.float32)
    readout = np.zeros((layers, experts, rank), np.float32)
    bias = np.zeros((layers, experts), np.float32)
    used = [use_matrix(trace, layer) for layer in range(layers)]
    for layer in range(layers):
        history, target = _history(used[layer], decays), _target(used[layer], options.horizon)
        residual = target - np.tensordot(direct, history, 1)
        blocks = [*history, *_neighbours(used, layer)]
        inputs[layer], readout[layer], bias[layer] = _reduced_rank(blocks, residual, options.ridges, rank)
        progress(layer)
    split = len(decays)
    return ForecastWeights(
        trace.layers,
        np.array(decays, np.float32),
        direct.astype(np.float32),
        np.ascontiguousarray(inputs[:, :, :split]),
        np.ascontiguousarray(inputs[:, :, split:]),
        readout,
        bias,
    )


def _history(used: F32, decays: tuple[float, ...]) -> F32:
    """[S, steps, E] as the policy knows it before each step."""
    return np.stack([shifted(decayed(used, decay), 1) for decay in decays])


def _target(used: F32, horizon: float) -> F32:
    """[steps, E]: near 1 for who is used soon after the step, 0 for who is not for long."""
    result: F32 = np.exp((1 - distances(used)) / horizon).astype(np.float32)
    return result


def _neighbours(used: list[F32], layer: int) -> Iterator[F32]:
    for n in range(1, NEIGHBOURS + 1):
        yield used[layer - n] if layer >= n else np.zeros_like(used[layer])


def _fit_direct(trace: Trace, options: ForecastOptions) -> F64:
    """Weight of each decayed count [S], one for all layers and experts: least squares."""
    size = len(options.decays) + 1
    gram, moment = np.zeros((size, size)), np.zeros(size)
    for layer in range(len(trace.layers)):
        used = use_matrix(trace, layer)
        x = np.concatenate([_history(used, options.decays), np.ones((1, *used.shape), np.float32)])
        x = x.reshape(size, -1)
        gram += x @ x.T
        moment += x @ _target(used, options.horizon).ravel()
    solution: F64 = np.linalg.solve(gram + 1e-6 * np.eye(size) * np.trace(gram), moment)
    return solution[:-1]


def _reduced_rank(
    blocks: list[F32], target: F32, ridges: tuple[float, ...], rank: int
) -> tuple[F32, F32, F32]:
    """inputs [E, blocks, rank], readout [E, rank], bias [E] of target ~ bias + sum of blocks @ inputs @ readout.T."""
    experts = target.shape[1]
    mean = np.concatenate([block.mean(0, dtype=np.float64) for block in blocks])
    scale = np.concatenate([block.std(0, dtype=np.float64) for block in blocks])
    scale[scale < 1e-6] = 1
    center = target.mean(0, dtype=np.float64)
    normal = _NormalEquations(blocks, target, mean, scale, center)
    split = int(len(target) * (1 - _HELD_OUT))
    fitted, held = normal.of(0, split), normal.of(split, len(target))
    ridge = min(ridges, key=lambda ridge: _loss(_solve(*fitted, ridge), *held))
    gram, moment = fitted[0] + held[0], fitted[1] + held[1]
    solution = _solve(gram, moment, ridge)
    _, vectors = np.linalg.eigh(solution.T @ gram @ solution)
    basis = vectors[:, -rank:]  # of what is forecast: its directions of most variance
    reduced = solution @ basis / scale[:, None]
    bias = center - mean @ reduced @ basis.T
    inputs = reduced.reshape(len(blocks), experts, rank).transpose(1, 0, 2)
    return inputs.astype(np.float32), basis.astype(np.float32), bias.astype(np.float32)


@dataclass(frozen=True)
class _NormalEquations:
    """Of the regression of a target on blocks, scaled to mean 0 and variance 1."""

    blocks: list[F32]
    target: F32
    mean: F64
    scale: F64
    center: F64

    def of(self, begin: int, end: int) -> tuple[F64, F64]:
        """Gram matrix [W, W] and moments [W, E] of some steps."""
        width = len(self.mean)
        gram, moment = np.zeros((width, width)), np.zeros((width, self.target.shape[1]))
        for first in range(begin, end, _ROWS):
            rows = slice(first, min(end, first + _ROWS))
            x = (np.concatenate([block[rows] for block in self.blocks], 1) - self.mean) / self.scale
            x32 = x.astype(np.float32)
            gram += x32.T @ x32
            moment += x32.T @ (self.target[rows] - self.center).astype(np.float32)
        return gram, moment


def _solve(gram: F64, moment: F64, ridge: float) -> F64:
    damped = gram.copy()
    damped[np.diag_indices_from(damped)] += ridge
    return np.asarray(np.linalg.solve(damped, moment), np.float64)


def _loss(solution: F64, gram: F64, moment: F64) -> float:
    """Squared error of a solution on the steps of these normal equations, short of a constant."""
    return float(np.sum(solution * (gram @ solution - 2 * moment)))
