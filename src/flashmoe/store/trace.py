"""Routing traces: which experts a model's routers picked, token by token (docs/format.md, section 10)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.errors import TraceError
from flashmoe.store.arrays import read_arrays

FORMAT = "flashmoe-trace"
VERSION = 1
PREFILL, DECODE = 0, 1
_MOST_EXPERTS = 1 << 16
_NO_TRACE = "record one with `flashmoe run --record-trace`"

Event = tuple[int, list[int]]  # layer, its experts


@dataclass(frozen=True)
class Trace:
    """What the routers picked for each token, in the order in which tokens were processed.

    expert_ids: uint16 [tokens, layers, k]; router_weights: float16 or float32 of the same shape, or None.
    token_ids, sequences, steps, phases: [tokens]; tokens of one step were processed together.
    domains: int [tokens] or None.  layers: the model's numbers of the layers.  experts: of each layer.
    model: identity of the bundle it was recorded with, "" where unknown.
    """

    path: Path
    expert_ids: NDArray[np.uint16]
    router_weights: NDArray[Any] | None
    token_ids: NDArray[np.int32]
    sequences: NDArray[np.int32]
    steps: NDArray[np.int32]
    phases: NDArray[np.uint8]
    domains: NDArray[Any] | None
    layers: tuple[int, ...]
    experts: int
    model: str

    @property
    def tokens(self) -> int:
        """How many were recorded."""
        return len(self.expert_ids)

    @property
    def per_token(self) -> int:
        """Experts of a token and layer."""
        return int(self.expert_ids.shape[2])

    def select(self, mask: NDArray[Any]) -> Trace:
        """Only some tokens (a mask or indices)."""
        chosen: dict[str, Any] = {
            name: getattr(self, name)[mask]
            for name in ("expert_ids", "token_ids", "sequences", "steps", "phases")
        }
        for name in ("router_weights", "domains"):
            values = getattr(self, name)
            chosen[name] = None if values is None else values[mask]
        return replace(self, **chosen)

    def decoding(self) -> Trace:
        """Only decoded tokens: a prompt is streamed past the cache and does not change it.  Raises TraceError."""
        decoded = self.phases == DECODE
        if not decoded.any():
            raise TraceError(f"{self.path}: no decoded token in it: record an answer of some length")
        return self if decoded.all() else self.select(decoded)

    def sequence_starts(self) -> NDArray[np.intp]:
        """Index of the first token of each run of tokens of one sequence."""
        changed = np.r_[True, self.sequences[1:] != self.sequences[:-1]] if self.tokens else np.zeros(0, bool)
        return np.flatnonzero(changed)

    def step_starts(self) -> NDArray[np.intp]:
        """Index of the first token of each step."""
        return np.flatnonzero(np.r_[True, self.steps[1:] != self.steps[:-1]])

    def events(self) -> Iterator[tuple[int, list[list[int]]]]:
        """Of each step (index of its first token, distinct experts of each layer in ascending order)."""
        starts = self.step_starts()
        ends = np.r_[starts[1:], self.tokens]
        ordered = np.sort(self.expert_ids, axis=2).tolist()
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            if end == start + 1:
                yield start, ordered[start]
            else:
                tokens = ordered[start:end]
                yield (
                    start,
                    [sorted({e for token in tokens for e in token[i]}) for i in range(len(self.layers))],
                )


def read_trace(path: Path) -> Trace:
    """Our own traces, and those that have at least `expert_ids` [tokens, layers, k].

    Without a header every token was decoded, one a step; sequences are told by `sequence_id`, or by a
    `context_position` that does not go on.  Raises TraceError.
    """
    arrays = read_arrays(path)
    ids = arrays.get("expert_ids")
    if ids is None or ids.ndim != 3 or ids.dtype.kind not in "iu" or 0 in ids.shape:
        raise TraceError(f"{path}: no expert_ids [tokens, layers, k] in it: {_NO_TRACE}")
    if int(ids.min()) < 0 or int(ids.max()) >= _MOST_EXPERTS:
        raise TraceError(f"{path}: expert numbers are not within 0 to {_MOST_EXPERTS - 1}: {_NO_TRACE}")
    header = _header(path, arrays.get("header"))
    tokens, layers, _ = ids.shape
    numbers = _layers(path, header, layers)
    most = int(ids.max()) + 1
    experts = header.get("experts", most)
    if not isinstance(experts, int) or not most <= experts <= _MOST_EXPERTS:
        raise TraceError(f"{path}: expert {most - 1} of {experts!r} experts: {_NO_TRACE}")
    if (np.diff(np.sort(ids, axis=2), axis=2) == 0).any():
        raise TraceError(f"{path}: a token has an expert twice: {_NO_TRACE}")
    weights = arrays.get("router_weights")
    if weights is not None and (weights.shape != ids.shape or weights.dtype.kind != "f"):
        raise TraceError(f"{path}: router_weights do not belong to expert_ids: {_NO_TRACE}")
    return Trace(
        path=path,
        expert_ids=ids.astype(np.uint16),
        router_weights=weights,
        token_ids=_column(path, arrays, "token_id", tokens, np.zeros(tokens)).astype(np.int32),
        sequences=_sequences(path, arrays, tokens),
        steps=_column(path, arrays, "step", tokens, np.arange(tokens)).astype(np.int32),
        phases=_column(path, arrays, "phase", tokens, np.full(tokens, DECODE)).astype(np.uint8),
        domains=_column(path, arrays, "domain_id", tokens, None) if "domain_id" in arrays else None,
        layers=numbers,
        experts=experts,
        model=str(header.get("model", "")),
    )


def header_bytes(values: dict[str, Any]) -> NDArray[np.uint8]:
    """JSON as an array, which any reader of .npz files passes over."""
    return np.frombuffer(json.dumps(values).encode(), np.uint8)


def parse_header(array: NDArray[Any]) -> dict[str, Any]:
    """The JSON object again; raises ValueError."""
    if array.dtype != np.uint8 or array.ndim != 1:
        raise ValueError("header is no text")
    try:
        header = json.loads(array.tobytes().decode())
    except RecursionError:
        raise ValueError("header is nested too deeply") from None
    if not isinstance(header, dict):
        raise ValueError("header is no object")
    return header


def _header(path: Path, array: NDArray[Any] | None) -> dict[str, Any]:
    if array is None:
        return {}
    try:
        header = parse_header(array)
    except ValueError as error:
        raise TraceError(f"{path}: {error}: {_NO_TRACE}") from None
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        raise TraceError(
            f"{path}: not version {VERSION} of {FORMAT}: record it again with this version of flashmoe"
        )
    return header


def _layers(path: Path, header: dict[str, Any], count: int) -> tuple[int, ...]:
    numbers = header.get("layers", list(range(count)))
    whole = isinstance(numbers, list) and all(type(n) is int and 0 <= n < 1 << 16 for n in numbers)
    if not whole or len(numbers) != count or sorted(set(numbers)) != numbers:
        raise TraceError(f"{path}: layer numbers do not belong to {count} layers: {_NO_TRACE}")
    return tuple(numbers)


def _column(
    path: Path, arrays: dict[str, NDArray[Any]], name: str, tokens: int, default: NDArray[Any] | None
) -> NDArray[Any]:
    values = arrays.get(name, default)
    if values is None or values.shape != (tokens,) or (values.dtype.kind == "f" and name in arrays):
        raise TraceError(f"{path}: {name} has not one whole number for each of {tokens} tokens: {_NO_TRACE}")
    return values


def _sequences(path: Path, arrays: dict[str, NDArray[Any]], tokens: int) -> NDArray[np.int32]:
    if "sequence_id" not in arrays and "context_position" in arrays:
        position = _column(path, arrays, "context_position", tokens, None).astype(np.int64)
        return np.cumsum(np.r_[0, np.diff(position) != 1]).astype(np.int32)
    return _column(path, arrays, "sequence_id", tokens, np.zeros(tokens)).astype(np.int32)
