"""A hot set that was chosen beforehand."""

from __future__ import annotations

from collections.abc import Sequence

from flashmoe.store.policies.scored import Scored


class StaticSet(Scored):
    """Evicts whoever was used least in a recorded trace, whatever happens now: the hottest stay for good.

    O(1) an event, O(R log R) one with victims.
    """

    def __init__(self, counts: Sequence[float]) -> None:
        """counts: uses of each expert of the layer in the trace."""
        super().__init__()
        self._scores = [float(count) for count in counts]

    def touch(self, experts: Sequence[int]) -> None:
        """See LayerPolicy."""
