"""The expert cache: experts asked for by a step come from slots, or are read into them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, KeysView, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from flashmoe.errors import BudgetError, ReadError
from flashmoe.store.activity import IN_FLIGHT, RESIDENT, Activity
from flashmoe.store.policies.base import Policy
from flashmoe.store.reader import ExpertReader
from flashmoe.store.records import RecordReads
from flashmoe.store.request import Ready, Request
from flashmoe.store.sizes import MAX_IN_FLIGHT, MAX_STAGING, min_slots, staging_slots
from flashmoe.store.slots import SlotArena
from flashmoe.store.stats import CacheStats, LayerCounts


class ExpertCache:
    """Experts of all layers in one pool of slots.

    Used by one thread; the reader's threads write only into slots of reads in flight.  A slot's content stays valid
    until the request (or the step of the stream) that returned it ends.  After a ReadError the cache is consistent:
    the failed experts are simply not resident.
    """

    def __init__(
        self,
        reader: ExpertReader,
        arena: SlotArena,
        policy: Policy,
        layers: Mapping[int, tuple[int, ...]],
        *,
        experts_per_token: int,
        checksums: Mapping[int, Sequence[str]] | None = None,
        experts: int = 0,
    ) -> None:
        """layers: layer -> (file index, bytes of a record[, S]); checksums: xxh3 (hex) of each layer's records.

        experts: of all layers; 0: nobody asks whether all are resident.

        S files from that index on share a layer's experts: e is record e // S of the (e % S)-th; 1 when left out.
        With checksums every record is verified after its read.  Raises BudgetError when the pool is too small.
        """
        if layers and arena.count < min_slots(experts_per_token):
            needed = min_slots(experts_per_token)
            raise BudgetError(
                f"{arena.count} expert slots cannot hold one step's {needed} experts: raise --memory or --expert-slots"
            )
        self.experts_per_token = experts_per_token
        self._arena, self._policy = arena, policy
        self._reads = RecordReads(reader, arena, layers, checksums)
        self.places = layers
        self._resident: dict[int, dict[int, int]] = {layer: {} for layer in layers}  # layer -> expert -> slot
        self._experts, self._present = experts, 0  # of all layers: all, and the resident ones
        self._staging: list[int] = []
        # slot -> (layer, expert), read before it is asked for; _passing: those of them that a stream reads ahead of
        # the next and does not keep.
        self._foreseen: dict[int, tuple[int, int]] = {}
        self._passing: set[int] = set()
        # As _foreseen, but read already: of _passing, and the others.
        self._arrived: dict[int, tuple[int, int]] = {}
        self._landed: dict[int, tuple[int, int]] = {}
        self._layer_stats = {layer: LayerCounts() for layer in layers}
        self._activity: Activity | None = None  # of somebody who watches
        self._current: tuple[int, dict[int, int]] = (0, {})  # layer, landing: of the last request or stream

    def request(self, layer: int, experts: Sequence[int]) -> Request:
        """Ask for distinct experts of one layer, at most the pool's size; reads of the missing ones start at once."""
        early, resident = self._begin(layer, experts), self._resident[layer]
        hits = [(expert, resident[expert]) for expert in experts if expert in resident]
        counts = self._layer_stats[layer]
        counts.hits += len(hits) - early
        counts.misses += early
        if len(hits) == len(experts):
            return Request(self, layer, experts, hits, {})
        missing: dict[int, int] = {}
        self._current = (layer, missing)
        try:
            self._read_missing(layer, experts, missing)
        except BaseException:  # Ctrl-C too: nobody else would wait for the reads that have begun
            self._drain(missing)
            raise
        counts.misses += len(missing)
        return Request(self, layer, experts, hits, missing)

    @property
    def whole(self) -> bool:
        """Whether every expert of every layer is resident."""
        return self._present == self._experts > 0

    def hit(self, layer: int, chosen: NDArray[np.int32], distinct: int) -> None:
        """Of a cache that is whole: a step has used so many of a layer's experts, `chosen` with repetitions.

        No policy hears of it, for none will have to choose a victim.
        """
        if self._activity is not None:
            self._activity.asked(layer, np.unique(chosen).tolist(), self._resident[layer])
        self._layer_stats[layer].hits += distinct

    def stream(
        self, layer: int, experts: Sequence[int], most: int, then: tuple[int, Sequence[int]] | None = None
    ) -> Iterator[Ready]:
        """Batches of (expert, slot), `most` or fewer, together all experts (ascending, distinct) in their order.

        Experts are read ahead, at the end also those that the stream `then` (another layer, experts) will probably
        ask for; a batch's slots are valid until the next one is asked for.  Those that are not resident pass
        through staging slots and do not displace what decoding has gathered; only slots that are free anyway keep
        them.  Raises ReadError.
        """
        self._end_guesses(layer, experts, self._arena.count // 2 + 1)
        landing = self._claim(layer, set(experts))  # slot -> expert, submitted and not yet landed
        self._current = (layer, landing)
        if self._activity is not None:
            self._activity.asked(layer, experts, self._resident[layer])
        staged = self._passing.intersection(landing)
        self._passing -= staged
        ahead = self._claim_arrived(layer, set(experts))
        staged.update(ahead.values())
        ahead.update((expert, slot) for slot, expert in landing.items())
        self._fill_staging(layer, experts, len(staged))
        if self._staging or staged:  # half of them are read into while the others are computed
            most = max(1, min(most, (len(self._staging) + len(staged)) // 2))
        queue: deque[tuple[int, int]] = deque()
        waiting = deque(experts)
        try:
            while waiting or queue:
                self._read_ahead(layer, waiting, queue, landing, staged, ahead, most)
                if not waiting:
                    self._read_on(then)
                while queue[0][1] in landing:
                    self._land(layer, landing, keep_resident=staged)
                batch: Ready = []
                while queue and len(batch) < most and queue[0][1] not in landing:
                    batch.append(queue.popleft())
                # Now, not after the batch: all of it may have landed, and the drive would be idle meanwhile.
                self._read_ahead(layer, waiting, queue, landing, staged, ahead, most)
                if not waiting:
                    self._read_on(then)
                yield batch
                passed = staged.intersection(slot for _, slot in batch)
                staged -= passed
                self._staging += passed
            self._read_on(then)
        finally:
            self._drain(landing, staged)
            self._staging += staged

    @property
    def free_slots(self) -> int:
        """Slots that hold nothing.  Thread-safe."""
        return self._arena.free

    def fill(self, layer: int, experts: Sequence[int]) -> bool:
        """Read experts that nobody has asked for into free slots; False when there are not enough of them.

        They count as neither hit nor miss, and their bytes as wasted.  Raises ReadError.
        """
        known = {*self._resident[layer], *(e for owner, e in self.coming if owner == layer)}
        missing = [expert for expert in experts if expert not in known]
        reading, landing = missing[: self._arena.free], dict[int, int]()
        self._current = (layer, landing)
        counts = self._layer_stats[layer]
        stalled = counts.stall_seconds
        try:
            for expert in reading:
                slot = self._arena.take()
                assert slot is not None
                landing[slot] = expert
                self._reads.submit(layer, expert, slot, ahead=True)
            while landing:
                self._land(layer, landing, set())
        finally:
            self._drain(landing)
            counts.stall_seconds = stalled
        return len(reading) == len(missing)

    def prefer(self, layer: int, experts: Sequence[int]) -> None:
        """Let the policy treat the resident experts as just used, the last one last."""
        self._policy.touch(layer, experts)

    def stats(self) -> CacheStats:
        """Counters so far."""
        layers = {layer: replace(counts) for layer, counts in self._layer_stats.items()}
        reads, queue = self._reads, self._reads.queue
        return CacheStats(layers, reads.nbytes, reads.wasted, queue.busy_seconds, queue.read_seconds)

    def resident(self, layer: int) -> dict[int, int]:
        """expert -> slot of what is in memory now (a copy)."""
        return dict(self._resident[layer])

    def resident_experts(self, layer: int) -> KeysView[int]:
        """The experts in memory, as they change."""
        return self._resident[layer].keys()

    @property
    def coming(self) -> set[tuple[int, int]]:
        """(layer, expert) of those that are read, or have been, before anybody has asked for them."""
        return {*self._foreseen.values(), *self._landed.values()}

    def watch(self, activity: Activity | None) -> None:
        """From now on note in `activity` which experts are asked for; None ends that.  Thread-safe."""
        self._activity = activity

    def picture(self, activity: Activity) -> dict[int, bytearray]:
        """layer -> one byte for each expert, of the bits of store/activity.py: hits and misses since the last picture.

        Thread-safe, and nobody waits for it: a copy of a dictionary's keys or values is one indivisible step.
        """
        rows = activity.take()
        for layer, row in rows.items():
            for expert in tuple(self._resident[layer]):
                row[expert] |= RESIDENT
        current, landing = self._current
        flying = [(current, expert) for expert in tuple(landing.values())]
        for layer, expert in (*flying, *tuple(self._foreseen.values())):
            rows[layer][expert] |= IN_FLIGHT
        return rows

    def _begin(self, layer: int, experts: Sequence[int]) -> int:
        """A step asks for `experts`; how many of them have become resident by that, because they were foreseen."""
        self._policy.touch(layer, experts)
        if self._activity is not None:
            self._activity.asked(layer, experts, self._resident[layer])
        early = self._end_guesses(layer, experts, len(experts))
        self._return_staging()
        return early

    def _keep(self, layer: int, expert: int, slot: int) -> None:
        """The expert is resident from now on."""
        self._resident[layer][expert] = slot
        self._present += 1
        self._policy.insert(layer, expert)

    def _read_missing(self, layer: int, experts: Sequence[int], missing: dict[int, int]) -> None:
        """Start reading the experts that are not resident; `missing` gets slot -> expert of each."""
        keep = set(experts)
        begun = self._claim(layer, keep)
        self._passing.difference_update(begun)
        missing.update(begun)
        for expert in experts:
            if expert not in self._resident[layer] and expert not in begun.values():
                slot = self._take(layer, keep)
                if slot is None:
                    raise BudgetError(
                        f"{self._arena.count} expert slots cannot hold {len(experts)}: raise --memory"
                    )
                missing[slot] = expert
                self._reads.submit(layer, expert, slot)

    def _read_ahead(
        self,
        layer: int,
        waiting: deque[int],
        queue: deque[tuple[int, int]],
        landing: dict[int, int],
        staged: set[int],
        ahead: dict[int, int],
        most: int,
    ) -> None:
        """Queue experts in order: resident ones and those read `ahead` freely, others while there is a slot."""
        resident, counts = self._resident[layer], self._layer_stats[layer]
        while waiting and len(queue) < max(most, 2 * MAX_IN_FLIGHT):
            expert = waiting[0]
            slot = resident.get(expert)
            if slot is not None:
                counts.hits += 1
            elif expert in ahead:
                slot = ahead[expert]
                counts.misses += 1
            else:
                slot = self._arena.take()
                if slot is None:
                    if not self._staging:
                        return
                    slot = self._staging.pop()
                    staged.add(slot)
                landing[slot] = expert
                self._reads.submit(layer, expert, slot)
                counts.misses += 1
            queue.append((expert, slot))
            waiting.popleft()

    def _read_on(self, then: tuple[int, Sequence[int]] | None) -> None:
        """Start reading for the stream after this one, into slots that are free or staging."""
        if then is None:
            return
        layer, experts = then
        known = {e for owner, e in (*self.coming, *self._arrived.values()) if owner == layer}
        for expert in experts:
            # One staging slot stays: the next stream may begin with an expert that nobody has foreseen.
            if len(known) >= MAX_STAGING or (len(self._staging) < 2 and not self._arena.free):
                return
            if expert not in self._resident[layer] and expert not in known:
                known.add(expert)
                slot = self._arena.take()
                if slot is None:
                    slot = self._staging.pop()
                    self._passing.add(slot)
                self._submit_ahead(layer, expert, slot)

    def _land(self, layer: int, landing: dict[int, int], keep_resident: set[int]) -> Ready:
        """Wait for reads; landed experts become resident unless their slot is in `keep_resident` (staging).

        Raises ReadError after all reads of `landing` have ended and their slots are free again.
        """
        self._policy.refresh()  # in time that is spent waiting anyway
        began = time.perf_counter()
        completions = self._reads.wait()
        self._layer_stats[layer].stall_seconds += time.perf_counter() - began
        if not completions:  # a Ctrl-C elsewhere lost the completions of reads ahead that are ours now
            self._reads.queue.clear()
            for slot in landing:
                self._reads.submit(layer, landing[slot], slot)
        ready, failed = [], ""
        for slot, error in completions:
            expert = landing.pop(slot, None)
            if expert is None:
                self._land_foreseen(slot, error)
                continue
            error = error or self._reads.damage(layer, expert, slot)
            if error:
                failed = failed or f"layer {layer}, expert {expert}: cannot read {error}"
                if slot not in keep_resident:
                    self._arena.give_back(slot)
                continue
            ready.append((expert, slot))
            if slot not in keep_resident:
                self._keep(layer, expert, slot)
        if failed:
            self._drain(landing, keep_resident)
            raise ReadError(failed + ": run `flashmoe verify` on the bundle")
        return ready

    def _land_foreseen(self, slot: int, error: str) -> None:
        """A read ahead of a step that did not ask for its expert has completed; the expert stays anyway.

        An error is not told: nobody needed the expert, and who does will read it again.
        """
        foreseen = self._foreseen.pop(slot, None)
        if foreseen is None:  # of a request that Ctrl-C stopped twice, its slot belongs to nobody any more
            return
        layer, expert = foreseen
        passing = slot in self._passing
        self._passing.discard(slot)
        if error or self._reads.damage(layer, expert, slot):
            self._arena.give_back(slot)
            return
        (self._arrived if passing else self._landed)[slot] = foreseen

    def _end_guesses(self, layer: int, experts: Sequence[int], slots: int) -> int:
        """The layer is asked for `experts` now.  What has been read ahead of it, right or wrong, becomes resident.

        Guesses whose read has not begun are taken back; the right ones among them are then read as others are.  If
        `slots` slots cannot be had beside them, as in the smallest pools, it waits for the rest, and what has been read
        ahead of later layers becomes resident too.  How many of `experts` have become resident.
        """
        if not self._foreseen and not self._landed:
            return 0
        try:
            self._withdraw()
            completions = self._reads.poll()
            while True:
                for slot, error in completions:
                    self._land_foreseen(slot, error)
                if not self._foreseen or slots + len(self._foreseen) <= self._arena.count:
                    break
                completions = self._reads.wait()
                if not completions:
                    self._settle({})
        except BaseException:  # Ctrl-C: what it had fetched is lost
            self._settle({})
            raise
        crowded = slots + len(self._foreseen) + len(self._landed) > self._arena.count
        return self._adopt(layer, experts, max(self._resident) if crowded else layer)

    def _withdraw(self) -> None:
        """Take back the guesses whose read has not begun."""
        for slot in self._reads.withdraw():
            owner, _ = self._foreseen.pop(slot)
            self._reads.never_read(owner)
            self._arena.give_back(slot)

    def _adopt(self, layer: int, experts: Sequence[int], last: int) -> int:
        """What has landed ahead of layers up to `last` becomes resident; how many of the layer's `experts` have."""
        early = 0
        for slot, (owner, expert) in list(self._landed.items()):
            if owner <= last:
                del self._landed[slot]
                self._keep(owner, expert, slot)
                early += owner == layer and expert in experts
        self._reads.waste(layer, -early)
        self._layer_stats[layer].foreseen += early
        return early

    def _claim(self, layer: int, experts: set[int]) -> dict[int, int]:
        """slot -> expert of those experts of the layer whose reads have begun ahead; they are the caller's now."""
        if not self._foreseen:
            return {}
        mine = {
            slot: expert
            for slot, (owner, expert) in self._foreseen.items()
            if owner == layer and expert in experts
        }
        for slot in mine:
            del self._foreseen[slot]
        self._layer_stats[layer].foreseen += len(mine)
        self._reads.waste(layer, -len(mine))
        return mine

    def _claim_arrived(self, layer: int, experts: set[int]) -> dict[int, int]:
        """expert -> slot of those that have arrived ahead of a stream; what it does not want gives its slot back."""
        mine: dict[int, int] = {}
        for slot, (owner, expert) in self._arrived.items():
            if owner == layer and expert in experts and expert not in self._resident[layer]:
                mine[expert] = slot
            else:
                self._staging.append(slot)
        self._arrived.clear()
        self._layer_stats[layer].foreseen += len(mine)
        self._reads.waste(layer, -len(mine))
        return mine

    def _foresee(self, guesses: Sequence[tuple[int, Sequence[int]]], using: int, keep: set[int]) -> None:
        """Start reading experts of coming layers, and no others; `keep` of layer `using` must stay."""
        self._withdraw()
        known = self.coming
        for layer, expert in dict.fromkeys((layer, e) for layer, experts in guesses for e in experts):
            if expert in self._resident[layer] or (layer, expert) in known:
                continue
            slot = self._take(using, keep)
            if slot is None:
                return
            self._submit_ahead(layer, expert, slot, prefetch=True)

    def _submit_ahead(self, layer: int, expert: int, slot: int, prefetch: bool = False) -> None:
        self._foreseen[slot] = (layer, expert)
        self._reads.submit(layer, expert, slot, ahead=True, prefetch=prefetch)

    def _drain(self, landing: dict[int, int], staged: set[int] | frozenset[int] = frozenset()) -> None:
        """Wait until nothing of `landing` is in flight; its slots become free (staging ones stay where they are)."""
        if landing:
            self._settle(landing, staged)

    def _settle(self, landing: dict[int, int], staged: set[int] | frozenset[int] = frozenset()) -> None:
        """As _drain, and for reads ahead too."""
        while completions := self._reads.wait():
            for slot, error in completions:
                if landing.pop(slot, None) is None:
                    self._land_foreseen(slot, error)
                elif slot not in staged:
                    self._arena.give_back(slot)
        # Nothing is in flight any more.  What is left was never submitted, or its completion was lost when Ctrl-C
        # interrupted the wait() that had fetched it.
        for slot in [*landing, *self._foreseen]:
            if slot not in staged:
                self._arena.give_back(slot)
        landing.clear()
        self._foreseen.clear()
        self._passing.clear()
        self._reads.queue.clear()

    def _take(self, layer: int, keep: set[int]) -> int | None:
        """A free slot, or the one of the policy's victim."""
        slot = self._arena.take()
        if slot is not None:
            return slot
        victim = self._policy.victim(layer, keep)
        if victim is None:
            return None
        self._policy.remove(*victim)
        self._present -= 1
        return self._resident[victim[0]].pop(victim[1])

    def _fill_staging(self, layer: int, experts: Sequence[int], passing: int) -> None:
        """Staging slots for a stream, beside those `passing` already; kept from layer to layer until a request."""
        resident = self._resident[layer]
        missing = sum(expert not in resident for expert in experts)
        if missing <= self._arena.free:
            return
        wanted = max(1, min(staging_slots(self._arena.count), missing) - passing)
        keep = set(experts)
        while len(self._staging) < wanted:
            slot = self._take(layer, keep)
            if slot is None:  # everything resident is of this layer and to be visited: read one of them again
                slot = self._take(layer, set())
            assert slot is not None  # staging never holds the whole pool
            self._staging.append(slot)

    def _return_staging(self) -> None:
        self._staging += self._arrived
        self._arrived.clear()
        while self._staging:
            self._arena.give_back(self._staging.pop())
