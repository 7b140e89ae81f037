"""A cache over a scripted reader: small records of known content, and a check that every slot is accounted for."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import pytest
import xxhash

from flashmoe.store.cache import ExpertCache
from flashmoe.store.fake_reader import FakeReader
from flashmoe.store.policies import LayeredLru
from flashmoe.store.slots import SlotArena

RECORD = 4096


class CheckedPolicy(LayeredLru):
    """Holds the cache to the policy's contract and remembers what it was told is resident."""

    def __init__(self) -> None:
        super().__init__()
        self.told: set[tuple[int, int]] = set()

    def insert(self, layer: int, expert: int) -> None:
        assert (layer, expert) not in self.told
        self.told.add((layer, expert))
        super().insert(layer, expert)

    def remove(self, layer: int, expert: int) -> None:
        self.told.remove((layer, expert))
        super().remove(layer, expert)


class InterruptedReader(FakeReader):
    """Ctrl-C strikes in the n-th wait() from now: before it has fetched completions, or after (they are lost)."""

    interrupts: list[tuple[int, bool]]

    def __init__(self, files: Sequence[bytes], order: Callable[[int], Sequence[int]] | None = None) -> None:
        super().__init__(files, order)
        self.interrupts = []

    def _completions(self) -> list[tuple[int, str]]:
        due = [lose for left, lose in self.interrupts if left == 0]
        self.interrupts = [(left - 1, lose) for left, lose in self.interrupts if left > 0]
        if due:
            if due[0]:
                super()._completions()
            raise KeyboardInterrupt
        return super()._completions()


class World:
    """`layers` files of `experts` records; layer l is file l + 1, as in the engine, where file 0 is another one."""

    def __init__(self, slots: int, *, layers: int = 3, experts: int = 6, k: int = 2, **options: Any) -> None:
        rng = random.Random(slots)
        self.layers, self.experts, self.k = layers, experts, k
        self.files = [b"", *(rng.randbytes(experts * RECORD) for _ in range(layers))]
        self.reader = InterruptedReader(self.files, options.pop("order", None))
        self.arena = SlotArena(slots, RECORD)
        self.policy = CheckedPolicy()
        checksums = None
        if options.pop("verify", False):
            checksums = {
                layer: [xxhash.xxh3_64_hexdigest(self.record(layer, e)) for e in range(experts)]
                for layer in range(layers)
            }
        self.cache = ExpertCache(
            self.reader,
            self.arena,
            self.policy,
            {layer: (layer + 1, RECORD) for layer in range(layers)},
            experts_per_token=k,
            checksums=checksums,
            experts=layers * experts,
        )

    def stream(
        self,
        layer: int,
        experts: Sequence[int],
        most: int = 1,
        then: tuple[int, Sequence[int]] | None = None,
    ) -> Iterator[tuple[int, int]]:
        """The cache's stream, one (expert, slot) after another; leaving it early leaves the cache's."""
        with closing(self.cache.stream(layer, experts, most, then)) as batches:
            for batch in batches:
                assert 1 <= len(batch) <= most
                yield from batch

    def record(self, layer: int, expert: int) -> bytes:
        """What the drive holds."""
        return self.files[layer + 1][expert * RECORD : (expert + 1) * RECORD]

    def holds(self, slot: int, layer: int, expert: int) -> bool:
        """Whether the slot has exactly the expert's bytes."""
        start = slot * RECORD
        content = self.arena.buffer.array()[start : start + RECORD].tobytes()
        return content == self.record(layer, expert)

    def request(self, layer: int, experts: Sequence[int]) -> dict[int, int]:
        """A whole step: expert -> slot, every slot's content checked while the request is open."""
        slots: dict[int, int] = {}
        with self.cache.request(layer, experts) as request:
            slots |= dict(request.hits)
            while ready := request.next_ready():
                assert not set(dict(ready)) & set(slots), "an expert is returned once"
                slots |= dict(ready)
            assert all(self.holds(slot, layer, expert) for expert, slot in slots.items())
        assert sorted(slots) == sorted(experts)
        assert len(set(slots.values())) == len(slots)
        return slots

    def resident(self) -> set[tuple[int, int]]:
        """(layer, expert) of everything in memory."""
        return {(layer, expert) for layer in range(self.layers) for expert in self.cache.resident(layer)}

    def check(self) -> None:
        """Between steps: only reads ahead in flight, every slot has one owner, every resident expert its bytes."""
        foreseen = list(self.cache._foreseen)
        assert self.reader.outstanding == len(foreseen)
        assert self.cache.whole == (len(self.resident()) == self.layers * self.experts)
        places = [
            (slot, layer, expert)
            for layer in range(self.layers)
            for expert, slot in self.cache.resident(layer).items()
        ]
        owned = [slot for slot, _, _ in places] + self.cache._staging + self.arena._free
        owned += [*foreseen, *self.cache._arrived, *self.cache._landed]
        assert sorted(owned) == list(range(self.arena.count))
        assert all(self.holds(*place) for place in places)
        assert self.policy.told == self.resident()


@pytest.fixture
def make_world() -> Callable[..., World]:
    """World(slots, layers=3, experts=6, k=2, order=None, verify=False)."""
    return World
