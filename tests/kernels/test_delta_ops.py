"""Convolution and gated delta rule: against the reference, a second reference in chunks, and themselves in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest

from flashmoe.kernels.cpu import CpuOps
from flashmoe.kernels.ops import TOLERANCE, Ops
from flashmoe.kernels.reference import ReferenceOps
from flashmoe.kernels.reference_delta import chunked, delta_inputs, recurrent

F = np.float32
TOKENS = (1, 2, 7, 65)
Check = Callable[..., Any]
# Key heads, value heads, key dimension (a multiple of 4), value dimension.
SHAPES = [(1, 1, 4, 1), (2, 6, 12, 7), (3, 3, 20, 33), (2, 4, 64, 48), (1, 2, 128, 128)]


def pieces(tokens: int, how: str) -> Iterator[slice]:
    """The whole, odd pieces, or one token after another."""
    cuts = {
        "whole": [0, tokens],
        "odd": [0, 1, 4, tokens // 2, tokens],
        "single": list(range(tokens + 1)),
    }
    for begin, end in pairwise(cuts[how]):
        yield slice(begin, end)


class Delta(NamedTuple):
    """Arguments of gated_delta_rule without the state."""

    mixed: np.ndarray
    a: np.ndarray
    b: np.ndarray
    a_log: np.ndarray
    dt_bias: np.ndarray

    def part(self, where: slice) -> Delta:
        return self._replace(mixed=self.mixed[where], a=self.a[where], b=self.b[where])

    def inputs(self, shape: tuple[int, int, int, int]) -> Any:
        return delta_inputs(*self, shape[1:], shape[0])


def delta_arguments(rng: np.random.Generator, shape: tuple[int, int, int, int], tokens: int) -> Delta:
    key_heads, value_heads, key_dim, value_dim = shape
    width = 2 * key_heads * key_dim + value_heads * value_dim
    return Delta(
        rng.normal(size=(tokens, width)).astype(F),
        rng.normal(size=(tokens, value_heads)).astype(F),
        rng.normal(size=(tokens, value_heads)).astype(F),
        rng.uniform(-4, 1, size=value_heads).astype(F),  # from slow to fast forgetting
        rng.normal(size=value_heads).astype(F),
    )


def run_delta(
    ops: Ops, arguments: Delta, state: np.ndarray, key_heads: int, how: str = "whole"
) -> list[np.ndarray]:
    state = state.copy()
    tokens, (heads, _, dim) = len(arguments.mixed), state.shape
    out = np.full((tokens, heads, dim), np.nan, F)
    for where in pieces(tokens, how):
        ops.gated_delta_rule(
            *arguments.part(where), [state], [where.stop - where.start], out[where], key_heads
        )
    return [out, state]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_delta_rule(
    tokens: int, shape: tuple[int, int, int, int], agrees: Check, rng: np.random.Generator
) -> None:
    arguments = delta_arguments(rng, shape, tokens)
    start = (0.1 * rng.normal(size=shape[1:])).astype(F)
    out, state = agrees("gated_delta_rule", lambda ops: run_delta(ops, arguments, start, shape[0]))
    # The second oracle shares nothing with the recurrence but the preparation of its inputs.
    expected = chunked(arguments.inputs(shape), start.astype(np.float64), 16)
    for ours, oracle in zip((out, state), expected, strict=True):
        np.testing.assert_allclose(ours, oracle, 0, TOLERANCE["gated_delta_rule"].absolute)


@pytest.mark.parametrize("size", [1, 7, 64, 100])
def test_the_two_references_are_one(size: int, rng: np.random.Generator) -> None:
    shape = (2, 4, 16, 24)
    inputs = delta_arguments(rng, shape, 90).inputs(shape)
    start = rng.normal(size=shape[1:])
    for one, other in zip(recurrent(inputs, start), chunked(inputs, start, size), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_delta_rule_in_pieces_gives_the_same_bits(
    shape: tuple[int, int, int, int], same_bits: Check, rng: np.random.Generator
) -> None:
    # Keys and queries are prepared for 256 tokens at a time.
    arguments, start = delta_arguments(rng, shape, 260), rng.normal(size=shape[1:]).astype(F)
    whole = same_bits(lambda ops: run_delta(ops, arguments, start, shape[0]))
    for how in ("odd", "single"):
        split = same_bits(lambda ops, how=how: run_delta(ops, arguments, start, shape[0], how))
        np.testing.assert_array_equal(whole[0], split[0])
        np.testing.assert_array_equal(whole[1], split[1])


def test_delta_rule_of_extreme_gates(agrees: Check, rng: np.random.Generator) -> None:
    """Nothing forgotten, everything forgotten (exp of -exp(5) * 80), nothing written, everything written."""
    shape = (2, 4, 8, 5)
    arguments = delta_arguments(rng, shape, 6)
    arguments.a[:, 0], arguments.a[:, 1] = -80, 80
    arguments.b[:, 2], arguments.b[:, 3] = -80, 80
    arguments.a_log[1] = 5
    arguments.mixed[3] = 0  # a query and key of zeros are not divided by zero
    arguments.mixed[4] *= F(1e-6)  # the 1e-6 under the root weighs more than their squares
    start = rng.normal(size=shape[1:]).astype(F)
    out, state = agrees("gated_delta_rule", lambda ops: run_delta(ops, arguments, start, shape[0]))
    assert not out[3].any()
    assert np.abs(state[1]).max() < np.abs(start[1]).max()


def test_delta_rule_of_no_tokens_keeps_the_state(backends: list[CpuOps], rng: np.random.Generator) -> None:
    shape = (1, 2, 8, 5)
    arguments, state = delta_arguments(rng, shape, 0), rng.normal(size=shape[1:]).astype(F)
    for ops in backends:
        fresh = CpuOps(ops.threads, isa=ops.isa)  # has no scratch memory yet
        np.testing.assert_array_equal(run_delta(fresh, arguments, state, 1)[1], state)


def run_conv(
    ops: Ops, u: np.ndarray, w: np.ndarray, state: np.ndarray, how: str = "whole"
) -> list[np.ndarray]:
    state, out = state.copy(), np.full_like(u, np.nan)
    for where in pieces(len(u), how):
        ops.causal_conv1d(u[where], w, [state], [where.stop - where.start], out[where])
    return [out, state]


@pytest.mark.parametrize("channels", [1, 16, 37, 1040])  # 1,024 channels are one task
@pytest.mark.parametrize("taps", [2, 3, 4, 9])
@pytest.mark.parametrize("tokens", TOKENS)
def test_conv(tokens: int, taps: int, channels: int, agrees: Check, rng: np.random.Generator) -> None:
    u, w = rng.normal(size=(tokens, channels)).astype(F), rng.normal(size=(taps, channels)).astype(F)
    start = rng.normal(size=(taps - 1, channels)).astype(F)
    _, state = agrees("causal_conv1d", lambda ops: run_conv(ops, u, w, start))
    np.testing.assert_array_equal(state, np.concatenate([start, u])[tokens:])


@pytest.mark.parametrize("taps", [2, 4, 9])
def test_conv_in_pieces_gives_the_same_bits(taps: int, same_bits: Check, rng: np.random.Generator) -> None:
    u, w = rng.normal(size=(41, 37)).astype(F), rng.normal(size=(taps, 37)).astype(F)
    start = rng.normal(size=(taps - 1, 37)).astype(F)
    whole = same_bits(lambda ops: run_conv(ops, u, w, start))
    for how in ("odd", "single"):
        split = same_bits(lambda ops, how=how: run_conv(ops, u, w, start, how))
        np.testing.assert_array_equal(whole[0], split[0])
        np.testing.assert_array_equal(whole[1], split[1])


def test_conv_saturates_its_gate(agrees: Check) -> None:
    u = np.array([[80.0, -80.0, 0.0, 1e-6, 1000.0]], F)
    w = np.array([[0.0] * 5, [1.0] * 5], F)
    out, _ = agrees("causal_conv1d", lambda ops: run_conv(ops, u, w, np.zeros((1, 5), F)))
    np.testing.assert_allclose(out[0], [80, 0, 0, 5e-7, 1000], atol=1e-12)


# Rows of each sequence: none, short ones in one region, more than one task's or one preparation's.
ROWS = [(1, 1, 1), (0, 3, 0, 2), (16, 1, 9), (17, 2), (30, 0, 250, 1), (300, 4)]


def calls_of(rows: tuple[int, ...]) -> Iterator[slice]:
    ends = np.cumsum(rows).tolist()
    for begin, end in zip([0, *ends], ends, strict=False):
        yield slice(begin, end)


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_sequences_together_are_sequences_alone(
    rows: tuple[int, ...], same_bits: Check, rng: np.random.Generator
) -> None:
    shape, tokens, ends = (2, 4, 8, 5), sum(rows), np.cumsum(rows).tolist()
    arguments = delta_arguments(rng, shape, tokens)
    u, w = rng.normal(size=(tokens, 37)).astype(F), rng.normal(size=(4, 37)).astype(F)
    pasts = rng.normal(size=(len(rows), 3, 37)).astype(F)
    memories = rng.normal(size=(len(rows), *shape[1:])).astype(F)

    def together(ops: Ops) -> list[np.ndarray]:
        past, memory, out, read = pasts.copy(), memories.copy(), np.empty_like(u), np.empty((tokens, 4, 5), F)
        ops.causal_conv1d(u, w, list(past), ends, out)
        ops.gated_delta_rule(*arguments, list(memory), ends, read, 2)
        return [out, past, read, memory]

    def alone(ops: Ops) -> list[np.ndarray]:
        past, memory, out, read = pasts.copy(), memories.copy(), np.empty_like(u), np.empty((tokens, 4, 5), F)
        for i, own in enumerate(calls_of(rows)):
            ops.causal_conv1d(u[own], w, [past[i]], [rows[i]], out[own])
            ops.gated_delta_rule(*arguments.part(own), [memory[i]], [rows[i]], read[own], 2)
        return [out, past, read, memory]

    for one, other in zip(same_bits(together), same_bits(alone), strict=True):
        np.testing.assert_array_equal(one, other)
    for native, reference in zip(same_bits(together), together(ReferenceOps()), strict=True):
        np.testing.assert_allclose(native, reference, 2e-6, 2e-6)
