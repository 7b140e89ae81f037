"""Logits of a better bundle in a file, so that many others are compared with it and it is computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from flashmoe.bundle.codecs import U8
from flashmoe.checkpoint.pread import read_exact
from flashmoe.engine.engine import Engine
from flashmoe.evaluation.perplexity import Progress
from flashmoe.evaluation.scoring import F32, logit_blocks
from flashmoe.evaluation.windows import Window


class StoredLogits:
    """A divergence.Reference that reads float32 rows [positions, vocab] from a file of its own making.

    4 bytes a token of the vocabulary and scored position: 1.6 GB for 8,192 positions of 49,152 tokens.
    """

    def __init__(
        self, file: Path, engine: Engine, windows: Sequence[Window], progress: Progress | None = None
    ) -> None:
        """Compute them.  Raises what Engine.feed() raises, OSError when the file cannot be written."""
        self._file, self._vocab = file, 0
        self._first: dict[int, int] = {}  # of each window, by identity, its first row
        total, done, row = sum(len(window.ids) for window in windows), 0, 0
        with file.open("wb") as out:
            for window in windows:
                self._first[id(window)] = row
                for _, logits in logit_blocks(engine, window.ids, window.first_scored):
                    self._vocab = logits.shape[1]
                    out.write(np.ascontiguousarray(logits, "<f4").data)
                    row += len(logits)
                done += len(window.ids)
                if progress is not None:
                    progress(done, total)
        self._kept = windows  # whose identities are in use

    def rows(self, most: int) -> int:
        """See divergence.Reference."""
        return most

    def blocks(self, window: Window, rows: int) -> Iterator[tuple[int, F32]]:
        """See divergence.Reference; ``window`` is one of those it was made of.  Raises ReadError."""
        row = self._first[id(window)]
        for begin in range(window.first_scored, len(window.ids), rows):
            count = min(rows, len(window.ids) - begin)
            raw: U8 = read_exact(self._file, 4 * self._vocab * row, 4 * self._vocab * count)
            yield begin, raw.view("<f4").reshape(count, self._vocab)
            row += count
