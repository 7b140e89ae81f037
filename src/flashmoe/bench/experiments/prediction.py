"""Reading ahead: by the next layer's router (the engine's own lookahead), by the previous token, or not at all."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from flashmoe.bench.experiments.base import Plain, Variant, exchange
from flashmoe.engine.loading import Parts
from flashmoe.engine.lookahead import Lookahead
from flashmoe.nn.blocks import Foresight
from flashmoe.nn.weights import F32
from flashmoe.store.cache import ExpertCache
from flashmoe.store.request import Request


class PreviousToken:
    """Does what a Lookahead does with another guess: the next layer asks for what it asked of the previous token."""

    def __init__(self, cache: ExpertCache, layers: Sequence[int]) -> None:
        self._cache, self._successor = cache, dict(itertools.pairwise(layers))
        self._last: dict[int, list[int]] = {}
        self._pending: tuple[int, list[int]] | None = None
        self._layer = -1
        self._asked = self._repeated = self._guessed = self._missing = 0

    def judge(self, layer: int, experts: Sequence[int]) -> None:
        """What the layer really asks for."""
        previous = self._last.get(layer)
        if previous is not None:
            self._asked += len(experts)
            self._repeated += len(set(experts).intersection(previous))
        self._last[layer], self._layer, self._pending = list(experts), layer, None

    def guess(self, foresight: Foresight | None, tokens: int, added: Callable[[], F32] | None = None) -> None:
        """The previous token's experts of the next layer that would have to be read.

        foresight: None where nothing may be read ahead, otherwise not asked.
        """
        layer = self._successor.get(self._layer)
        if foresight is None or layer is None or layer not in self._last:
            return
        resident = self._cache.resident_experts(layer)
        missing = [expert for expert in self._last[layer] if expert not in resident]
        self._guessed += len(self._last[layer])
        self._missing += len(missing)
        self._pending = layer, missing

    def read(self, request: Request) -> None:
        """Hand them over, as the engine's lookahead does."""
        if self._pending is not None:
            request.foresee(self._pending)
            self._pending = None

    def note(self) -> str:
        """See Variant."""
        repeated = self._repeated / self._asked if self._asked else 0.0
        return (
            f"{repeated:.0%} of experts were the previous token's; "
            f"{self._missing} of {self._guessed} such guesses were not in the pool any more"
        )

    def close(self) -> None:
        """See Variant."""


def install(parts: Parts, setting: str, scratch: Path | None) -> Variant:
    """setting: "off" or "on" of the engine's lookahead, or "temporal"."""
    if setting != "temporal":
        exchange(parts, lookahead=setting)
        return Plain()
    exchange(parts)
    guesses = PreviousToken(parts.cache, [layer.layer for layer in parts.bundle.expert_layers])
    parts.experts.lookahead = cast(Lookahead, guesses)
    return guesses
