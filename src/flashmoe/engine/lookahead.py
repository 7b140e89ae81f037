"""When to read experts before they are asked for: only into idle time of the drive, and only while it helps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from flashmoe.nn.blocks import Foresight
from flashmoe.nn.weights import F32
from flashmoe.store.cache import ExpertCache
from flashmoe.store.request import Request

# Guesses for a layer.  The reader begins with one when less than two reads are in flight, and what it has not begun is
# taken back when the layer is asked: more of them cost little, 2, 4 and 8 are within 5 % (docs/experiments.md).
AHEAD = 4
# Reads that keep the drive busy until the next layer is asked.  Where it will probably want fewer, layers after it are
# guessed too, at most DEPTH layers in all.
ENOUGH = 3
DEPTH = 3
# The least probable of a token's k experts, so many eighths of them for each layer ahead, are not guessed: of the last
# of eight 53 % are right one layer ahead and 40 % three layers ahead, of the sixth 85 and 65 %, of the third 96 and 86.
_UNSURE = 8
# Reads that a layer waits for.  More keep the drive busy while its hits are computed, whose results guess better.
TAIL = 1
# A pool of fewer steps than this cannot lend slots: what it holds for the step itself would leave.
_MIN_STEPS = 4
# A wrong guess takes the drive for about as long as a right one saves.
_WORTH = 0.5
_MEMORY = 0.98  # of the running share of right guesses: it looks back on some 50 guesses
# While guesses are not worth it, one token in so many is guessed, and only to see whether they have become better.
_PROBE = 16

MODES = ("auto", "on", "off")


def reads_ahead(slots: int, experts: int) -> bool:
    """Whether a pool is large enough for reading ahead beside a step of so many experts."""
    return slots >= _MIN_STEPS * experts


class Lookahead:
    """Guesses what the next layers will need, and keeps account of how often it was right.  Not thread-safe.

    mode: "on" always reads ahead, "auto" while at least half of the recent guesses were right, "off" never.
    """

    def __init__(self, cache: ExpertCache, mode: str) -> None:
        self._cache, self._mode = cache, mode
        self.accuracy = 1.0 if mode == "on" else _WORTH  # share of right guesses lately
        self.guesses = self.right = 0
        self._pending: dict[int, list[int]] = {}  # layer -> experts
        self._steps = 0

    @property
    def reading(self) -> bool:
        """Whether guesses are read, not only judged."""
        return self._mode == "on" or (self._mode == "auto" and self.accuracy >= _WORTH)

    def judge(self, layer: int, experts: Sequence[int]) -> None:
        """What the layer really asks for."""
        self._steps += 1
        pending, self._pending = self._pending, {}
        for expert in pending.get(layer, ()):
            right = expert in experts
            self.guesses += 1
            self.right += right
            self.accuracy = _MEMORY * self.accuracy + (1 - _MEMORY) * right

    def guess(self, foresight: Foresight | None, tokens: int, added: Callable[[], F32] | None = None) -> None:
        """The most probable experts of the next layer that would have to be read; with few of them, of more layers.

        tokens: of the step, each with AHEAD experts.  added: makes what Foresight takes, if a guess is made at all;
        the last guess before a layer counts.
        """
        if foresight is None or self._mode == "off":
            return
        if not self.reading and self._steps % _PROBE:
            return
        coming, reads = self._cache.coming, 0
        self._pending = {}
        layers = itertools.islice(foresight(None if added is None else added()), DEPTH)
        for distance, (layer, chosen) in enumerate(layers, 1):
            resident = self._cache.resident_experts(layer)
            sure = chosen.T[: -(-chosen.shape[1] * (_UNSURE - distance) // _UNSURE)]
            missing = list(dict.fromkeys(e for e in sure.ravel().tolist() if e not in resident))
            del missing[AHEAD * tokens :]
            self._pending[layer] = missing
            reads += sum((layer, expert) not in coming for expert in missing)
            if reads >= ENOUGH:
                return

    def read(self, request: Request) -> None:
        """Hand over what was guessed: the reader begins with it while little else is read."""
        if self._pending and self.reading:
            request.foresee(*self._pending.items())
