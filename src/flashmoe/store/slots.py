"""The memory pool: equal slots, each room for one expert record."""

from __future__ import annotations

from flashmoe.errors import BudgetError
from flashmoe.store.reader import AlignedBuffer
from flashmoe.types import format_size


class SlotArena:
    """`count` slots of `record_nbytes` in one aligned mapping; slot i starts at i * record_nbytes.

    A model without experts has an arena of no slots.

    Pages are touched only when a record lands, so an unused slot costs no memory; huge ones are asked for unless
    `huge` is False (the bench compares).  Not thread-safe.
    Raises BudgetError when the system refuses the memory.
    """

    def __init__(self, count: int, record_nbytes: int, huge: bool = True) -> None:
        if (count, record_nbytes) != (0, 0) and (count < 1 or record_nbytes < 1 or record_nbytes % 4096):
            raise BudgetError(
                f"a pool of {count} slots of {record_nbytes} bytes is impossible: raise --memory"
            )
        try:
            self.buffer = AlignedBuffer(max(count * record_nbytes, 4096), huge)
        except MemoryError:
            raise BudgetError(
                f"the system refused {format_size(count * record_nbytes)} for expert slots: lower --memory"
            ) from None
        self.count = count
        self.record_nbytes = record_nbytes
        self.address: int = self.buffer.address
        self._free = list(range(count - 1, -1, -1))

    @property
    def free(self) -> int:
        """Slots that hold nothing."""
        return len(self._free)

    def take(self) -> int | None:
        """A free slot, or None."""
        return self._free.pop() if self._free else None

    def give_back(self, slot: int) -> None:
        """The slot's content is not needed any more."""
        self._free.append(slot)
