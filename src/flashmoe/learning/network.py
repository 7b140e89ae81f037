"""Training FlashMoE's network as published (arXiv 2601.17063): Belady distances, AdamW, early stopping."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashmoe.learning.targets import NEVER, distances, use_matrix
from flashmoe.store.policies.flashmoe_net import NetworkWeights
from flashmoe.store.policies.flashmoe_net import distances as predict
from flashmoe.store.trace import Trace

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class NetworkOptions:
    """As published, but for what early stopping judges by, which is not told there.

    held_out: that share of the sequences.  Single steps drawn at random have neighbours among those trained on, and
    let it go on ten times as long, at a loss of 1 to 2 points of hit rate (docs/decisions/010).
    cold: recency and counts begin anew with each sequence, for pools that do so too; otherwise they go on as a run's
    do.  Trained on one kind and used with the other it loses 2 to 6 points of hit rate (docs/decisions/010).
    """

    hidden: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    batch: int = 256
    epochs: int = 200
    patience: int = 5
    held_out: float = 0.1
    seed: int = 0
    cold: bool = False


def fit_network(
    trace: Trace, options: NetworkOptions, progress: Callable[[int], None] = lambda layer: None
) -> NetworkWeights:
    """Train one network a layer; deterministic for a seed."""
    networks, begins = [], _sequence_steps(trace)
    starts = set(begins.tolist()) if options.cold else set[int]()
    judged = _judged(begins, len(trace.step_starts()), options.held_out)
    for layer in range(len(trace.layers)):
        used = use_matrix(trace, layer)
        networks.append(_fit_layer(_inputs(used, starts), _targets(used), judged, options))
        progress(layer)
    return NetworkWeights(trace.layers, *(np.stack(parts) for parts in zip(*networks, strict=True)))


def _sequence_steps(trace: Trace) -> NDArray[np.intp]:
    """The first step of each run of one sequence."""
    return np.unique(np.searchsorted(trace.step_starts(), trace.sequence_starts()))


def _judged(begins: NDArray[np.intp], steps: int, share: float) -> NDArray[np.bool_]:
    """[steps]: True in one of every 1 / share sequences; in the last of the steps where there are fewer."""
    cycle = round(1 / share)
    if len(begins) < cycle:
        return np.arange(steps) >= steps - max(1, int(steps * share))
    sequence = np.searchsorted(begins, np.arange(steps), "right") - 1
    return np.asarray(sequence % cycle == cycle // 2)


def _inputs(used: F32, starts: AbstractSet[int]) -> F32:
    """[steps, 2 E]: recency and frequency after each step; the history begins anew with each step of `starts`."""
    steps, experts = used.shape
    x = np.empty((steps, 2 * experts), np.float32)
    last, counts = np.full(experts, -np.inf), np.zeros(experts)
    for i, row in enumerate(used):
        if i in starts:
            last, counts = np.full(experts, -np.inf), np.zeros(experts)
        last[row > 0] = i
        counts += row
        x[i, :experts] = 1 / (i - last + 1)
        x[i, experts:] = counts / max(1.0, counts.max())
    return x


def _targets(used: F32) -> F32:
    """[steps, E]: Belady distance, 0: the next step, 1: the cap (48 steps of 64 experts, 98 of 128) or beyond."""
    cap = max(2, used.shape[1] * 50 // 64 - 2)
    far = np.minimum(distances(used), NEVER).clip(1, cap)
    result: F32 = ((far - 1) / (cap - 1)).astype(np.float32)
    return result


def _fit_layer(x: F32, y: F32, judged: NDArray[np.bool_], options: NetworkOptions) -> list[F32]:
    """judged: rows that early stopping judges by; the others are trained on."""
    rng = np.random.default_rng(options.seed)
    widths = [x.shape[1], options.hidden, options.hidden, y.shape[1]]
    network: list[F32] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        reach = fan_in**-0.5
        network.append(rng.uniform(-reach, reach, (fan_in, fan_out)).astype(np.float32))
        network.append(rng.uniform(-reach, reach, fan_out).astype(np.float32))
    trained, x_judged, y_judged = np.flatnonzero(~judged), x[judged], y[judged]
    optimizer = _AdamW(network, options)
    best, kept, waited = np.inf, [part.copy() for part in network], 0
    for _ in range(options.epochs):
        rng.shuffle(trained)
        for begin in range(0, len(trained), options.batch):
            rows = trained[begin : begin + options.batch]
            optimizer.step(_gradients(x[rows], y[rows], network))
        loss = float(((predict(x_judged, network) - y_judged) ** 2).mean())
        waited += 1
        if loss < best:
            best, kept, waited = loss, [part.copy() for part in network], 0
        if waited > options.patience:
            break
    return kept


def _gradients(x: F32, y: F32, network: list[F32]) -> list[F32]:
    """Of the mean squared error."""
    w1, b1, w2, b2, w3, b3 = network
    a1 = x @ w1 + b1
    s1 = 1 / (1 + np.exp(-a1))
    h1 = a1 * s1
    a2 = h1 @ w2 + b2
    s2 = 1 / (1 + np.exp(-a2))
    h2 = a2 * s2
    a3 = h2 @ w3 + b3
    d3 = 2 / y.size * (np.abs(a3) - y) * np.sign(a3)
    d2 = (d3 @ w3.T) * s2 * (1 + a2 * (1 - s2))
    d1 = (d2 @ w2.T) * s1 * (1 + a1 * (1 - s1))
    return [x.T @ d1, d1.sum(0), h1.T @ d2, d2.sum(0), h2.T @ d3, d3.sum(0)]


class _AdamW:
    """Loshchilov and Hutter (arXiv 1711.05101); changes the parameters in place."""

    def __init__(self, parameters: list[F32], options: NetworkOptions) -> None:
        self._parameters, self._options = parameters, options
        self._means = [np.zeros_like(p) for p in parameters]
        self._squares = [np.zeros_like(p) for p in parameters]
        self._steps = 0

    def step(self, gradients: list[F32]) -> None:
        """One update."""
        self._steps += 1
        rate, decay = self._options.learning_rate, self._options.weight_decay
        correction = np.float32((1 - 0.999**self._steps) ** 0.5 / (1 - 0.9**self._steps))
        for p, g, mean, square in zip(self._parameters, gradients, self._means, self._squares, strict=True):
            mean += np.float32(0.1) * (g - mean)
            square += np.float32(0.001) * (g * g - square)
            p *= np.float32(1 - rate * decay)
            p -= np.float32(rate) * correction * mean / (np.sqrt(square) + np.float32(1e-8))
