"""Log-probabilities of given tokens under a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from flashmoe.engine.engine import Engine

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

# Logits that are looked at together, in bytes: 256 MiB are 270 tokens of a vocabulary of 248,320.  Every block reads
# nearly all experts of a large model once, so smaller ones cost reads.
_BLOCK_NBYTES = 256 << 20
_MOST_ROWS = 512
# Rows whose float64 copies exist at a time.
_SLICE_ROWS = 16


def block_rows(vocab_size: int) -> int:
    """Tokens whose logits are asked for at a time."""
    return max(1, min(_MOST_ROWS, _BLOCK_NBYTES // (4 * max(vocab_size, 1))))


def logit_blocks(
    engine: Engine, ids: Sequence[int], first: int, most: int | None = None
) -> Iterator[tuple[int, F32]]:
    """(p, logits [n, vocab]) of a fresh sequence: row i predicts ids[p + i], for p = `first` >= 1 to the end in order.

    A block has at most `most` rows and is valid until the next one is asked for.  Raises what Engine.feed() raises.
    """
    engine.start()
    if first > 1:
        engine.feed(list(ids[: first - 1]), "none")
    begin, end = first - 1, len(ids) - 1
    while begin < end:
        rows = min(most or engine.logit_rows, end - begin)
        yield begin + 1, engine.feed(list(ids[begin : begin + rows]))
        begin += rows


def log_softmax(logits: F32) -> Iterator[tuple[slice, F64]]:
    """(rows, natural logarithms of their probabilities [len(rows), vocab] in float64), a few rows at a time."""
    for begin in range(0, len(logits), _SLICE_ROWS):
        rows = slice(begin, min(begin + _SLICE_ROWS, len(logits)))
        part = logits[rows].astype(np.float64)
        part -= part.max(axis=1, keepdims=True)
        part -= np.log(np.exp(part).sum(axis=1, keepdims=True))
        yield rows, part


def log_probabilities(engine: Engine, ids: Sequence[int], first: int) -> F64:
    """log p(ids[i] | ids[:i]) for i = `first` >= 1 to the end, natural logarithms."""
    found = []
    for begin, logits in logit_blocks(engine, ids, first):
        for rows, logs in log_softmax(logits):
            wanted = np.array(ids[begin + rows.start : begin + rows.stop])
            found.append(logs[np.arange(len(wanted)), wanted])
    return np.concatenate(found) if found else np.zeros(0)
