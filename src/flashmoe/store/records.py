"""Whole records on their way into slots: where they lie on the drive, whether they are intact, what was read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import xxhash

from flashmoe.store.reader import ExpertReader
from flashmoe.store.slots import SlotArena
from flashmoe.store.stats import QueueDepth


class _Place(NamedTuple):
    """Where a layer's records are, see ExpertCache."""

    first_file: int
    nbytes: int
    files: int = 1


class RecordReads:
    """Reads of records, each named by its slot, and their bytes.  Not thread-safe.

    nbytes: of all that began; wasted: of those among them that were read ahead and not asked for.
    """

    def __init__(
        self,
        reader: ExpertReader,
        arena: SlotArena,
        layers: Mapping[int, tuple[int, ...]],
        checksums: Mapping[int, Sequence[str]] | None,
    ) -> None:
        """See ExpertCache."""
        self._reader, self._arena, self._checksums = reader, arena, checksums
        self._layers = {layer: _Place(*place) for layer, place in layers.items()}
        self.nbytes = self.wasted = 0
        self.queue = QueueDepth()

    def submit(self, layer: int, expert: int, slot: int, ahead: bool = False, prefetch: bool = False) -> None:
        """Start reading; ahead: wasted until somebody asks for it; prefetch: see ExpertReader."""
        first, nbytes, files = self._layers[layer]
        turn, stripe = divmod(expert, files)
        self.nbytes += nbytes
        if ahead:
            self.wasted += nbytes
        self.queue.change(1)
        start = slot * self._arena.record_nbytes
        read = (first + stripe, turn * nbytes, nbytes, self._arena.buffer, start)
        self._reader.submit(read, slot, prefetch)

    def wait(self) -> list[tuple[int, str]]:
        """(slot, "" or what went wrong) of reads that have ended, at least one; [] when none is left."""
        completions = self._reader.wait()
        self.queue.change(-len(completions))
        return completions

    def poll(self) -> list[tuple[int, str]]:
        """The same without blocking."""
        completions = self._reader.poll()
        self.queue.change(-len(completions))
        return completions

    def withdraw(self) -> list[int]:
        """The slots of prefetches that had not begun and now never will."""
        slots = self._reader.withdraw()
        self.queue.change(-len(slots))
        return slots

    def never_read(self, layer: int) -> None:
        """A record of this layer was withdrawn."""
        self.nbytes -= self._layers[layer].nbytes
        self.wasted -= self._layers[layer].nbytes

    def waste(self, layer: int, records: int) -> None:
        """So many records of the layer are known to have been read for nobody; negative: were asked for after all."""
        self.wasted += records * self._layers[layer].nbytes

    def damage(self, layer: int, expert: int, slot: int) -> str:
        """What is wrong with the record in the slot, as far as a checksum tells."""
        if self._checksums is None:
            return ""
        start = slot * self._arena.record_nbytes
        record = self._arena.buffer.array()[start : start + self._layers[layer].nbytes]
        intact = xxhash.xxh3_64_hexdigest(record.data) == self._checksums[layer][expert]
        return "" if intact else "its record: the checksum does not match"
