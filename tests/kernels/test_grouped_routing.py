"""Sigmoid routing with groups and a correction bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from flashmoe.kernels.cpu import CpuOps
from flashmoe.kernels.ops import Ops

F = np.float32
Check = Callable[..., Any]


def routed(ops: Ops, logits: np.ndarray, bias: np.ndarray, k: int, *how: Any) -> list[np.ndarray]:
    chosen, weights = np.full((len(logits), k), -1, np.int32), np.full((len(logits), k), np.nan, F)
    ops.route_grouped(logits, bias, k, *how, chosen, weights)
    return [weights, chosen]


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(
    ("experts", "k", "groups", "best"),
    [(1, 1, 1, 1), (7, 7, 1, 1), (64, 6, 8, 3), (256, 8, 8, 4), (6, 2, 6, 2), (128, 8, 1, 1)],
)
def test_against_the_reference(
    experts: int, k: int, groups: int, best: int, normalise: bool, agrees: Check, rng: np.random.Generator
) -> None:
    for tokens in (1, 9):
        logits = rng.normal(scale=2, size=(tokens, experts)).astype(F)
        bias = rng.normal(scale=0.3, size=experts).astype(F)

        def run(ops: Ops, logits: Any = logits, bias: Any = bias) -> list[np.ndarray]:
            return routed(ops, logits, bias, k, groups, best, normalise, 2.5)

        weights, chosen = agrees("route_grouped", run)
        assert np.unique(chosen // (experts // groups)).size <= groups
        if normalise:
            np.testing.assert_allclose(weights.sum(-1), 2.5, rtol=1e-6)


def test_the_bias_decides_but_does_not_weigh(agrees: Check) -> None:
    """Group 1 wins by its bias; within it the order is that of score + bias, the weights are scores alone."""
    logits = np.array([[4, 4, 0, 1, 2, 3]], F)
    bias = np.array([0, 0, 5, 5, 0, 0], F)
    weights, chosen = agrees("route_grouped", lambda ops: routed(ops, logits, bias, 2, 3, 1, False, 1.0))
    assert chosen.tolist() == [[3, 2]]
    np.testing.assert_allclose(weights[0], [1 / (1 + np.exp(-1)), 0.5], rtol=1e-6)


def test_ties_go_to_the_lower_number(agrees: Check) -> None:
    logits, bias = np.zeros((1, 12), F), np.zeros(12, F)
    _, chosen = agrees("route_grouped", lambda ops: routed(ops, logits, bias, 4, 4, 2, True, 1.0))
    assert chosen.tolist() == [[0, 1, 2, 3]]


def test_negative_scores_still_beat_other_groups(agrees: Check) -> None:
    """A bias may push scores below zero: experts outside the chosen groups must not win by that."""
    logits, bias = np.zeros((1, 4), F), np.array([-3, -4, -9, -9], F)
    _, chosen = agrees("route_grouped", lambda ops: routed(ops, logits, bias, 2, 2, 1, True, 1.0))
    assert chosen.tolist() == [[0, 1]]


def test_what_is_not_a_number_is_refused(backends: list[CpuOps]) -> None:
    logits = np.zeros((2, 4), F)
    logits[1, 2] = np.nan
    for ops in backends:
        with pytest.raises(RuntimeError, match="not a number"):
            routed(ops, logits, np.zeros(4, F), 2, 1, 1, True, 1.0)
