"""What a step holds while its experts are read: the experts of one layer, as they land."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from flashmoe.store.cache import ExpertCache

Ready = list[tuple[int, int]]  # (expert, slot)


class Request:
    """One step's experts of one layer.  A context manager; leaving it waits for reads that were not consumed."""

    __slots__ = ("_cache", "_experts", "_landing", "_layer", "hits")

    def __init__(
        self, cache: ExpertCache, layer: int, experts: Sequence[int], hits: Ready, landing: dict[int, int]
    ) -> None:
        self._cache, self._layer, self._experts, self._landing = cache, layer, experts, landing
        self.hits = hits

    @property
    def outstanding(self) -> int:
        """Reads that this request waits for."""
        return len(self._landing)

    def next_ready(self) -> Ready:
        """Experts that have landed since the last call, at least one; [] when all have been returned.

        Raises ReadError (after the request's other reads have ended) when one cannot be read.
        """
        while self._landing:
            if ready := self._cache._land(self._layer, self._landing, set()):
                return ready
        return []

    def foresee(self, *guesses: tuple[int, Sequence[int]]) -> None:
        """Read what will probably be asked for: (layer, experts) of coming layers, the soonest and most probable first.

        Each read begins when at most one other is in flight, and not at all if the next request comes before that.
        """
        self._cache._foresee(guesses, self._layer, set(self._experts))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cache._drain(self._landing)
