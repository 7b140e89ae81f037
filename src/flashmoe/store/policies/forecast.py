"""What the experts used lately foretell about those used next: a linear forecast, fitted to a recorded trace.

History of an expert alone hardly beats LfuDecay (docs/decisions/010); what helps is which experts are used together:
within a layer over time, and in the layers just before.  Fitting is in flashmoe/learning/forecast.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashmoe.store.policies.scored import Scored

F32 = NDArray[np.float32]
NEIGHBOURS = 2  # layers before whose choice of the same step is taken into account


@dataclass(frozen=True)
class ForecastWeights:
    """L layers of E experts, S decays, rank r; all float32.

    uses[s, e] = sum over past events of decays[s] ** age * (1 if expert e was used), age 0 for the latest.
    z = sum over s and experts e of uses[s, e] * inputs[l, e, s] + sum over the experts e of the n-th layer before,
    in this step, of neighbours[l, e, n].
    forecast[e] = direct @ uses[:, e] + readout[l, e] @ z + bias[l, e]: of exp(-(events until the next use) / horizon).
    """

    layers: tuple[int, ...]
    decays: F32  # [S]
    direct: F32  # [S]
    inputs: F32  # [L, E, S, r]
    neighbours: F32  # [L, E, NEIGHBOURS, r]
    readout: F32  # [L, E, r]
    bias: F32  # [L, E]

    @property
    def nbytes(self) -> int:
        """Memory of the arrays."""
        return sum(a.nbytes for a in (self.inputs, self.neighbours, self.readout, self.bias))


class Forecast:
    """All layers' forecasts; each layer's LayerPolicy is made by layer().

    A layer's forecast for a step knows the layer's events up to the step before, and what the two layers before it
    used in this one.  So it can be made before the layer is asked for anything: refresh() does that while the cache
    waits for reads (docs/decisions/010 has the microseconds); whoever was not refreshed in time does it himself, with
    the same result.  Not thread-safe.
    """

    def __init__(self, weights: ForecastWeights) -> None:
        layers, experts, decays, rank = weights.inputs.shape
        # The same for all layers, so that it stays in the processor's caches from layer to layer.
        self.decays = np.repeat(weights.decays[:, None], experts + rank, 1)
        self.ones, self.used = np.ones(max(experts, decays), np.float32), np.zeros(experts, np.float32)
        self._layers = [ForecastLayer(self, index, weights) for index in range(layers)]
        self._by_number = dict(zip(weights.layers, self._layers, strict=True))
        self.current = -1  # index of the layer that was touched last
        self._late: list[int] = []  # layers with an event that their forecast does not know yet

    def layer(self, number: int) -> ForecastLayer:
        """The policy of a layer; KeyError when the weights do not have it."""
        return self._by_number[number]

    def refresh(self) -> None:
        """Do now what the next victims would wait for."""
        late, self._late = self._late, []
        for index in late:
            self._layers[index].settle()
            if index + 1 < len(self._layers):
                self._layers[index + 1].forecast()

    def before(self, index: int) -> list[ForecastLayer]:
        """The layers before one, the nearest first, at most NEIGHBOURS."""
        return self._layers[max(0, index - NEIGHBOURS) : index][::-1]

    def touched(self, index: int) -> None:
        """A layer has an event to be settled; those after it know of it from now on."""
        self.current = index
        self._late.append(index)
        for after in self._layers[index + 1 : index + 1 + NEIGHBOURS]:
            after.outdate()


class ForecastLayer(Scored):
    """LayerPolicy: who is forecast least leaves.

    O(k) an event; O(k (S + NEIGHBOURS) r + E (S + r)) when refreshed; O(E + R log R) once more for an event with
    victims.  What a call to numpy costs weighs more than the numbers in it, so arrays that change together are one
    array, and views of them are made once.
    """

    def __init__(self, owner: Forecast, index: int, weights: ForecastWeights) -> None:
        super().__init__()
        layers, experts, decays, rank = weights.inputs.shape
        self._owner, self._index = owner, index
        # What an expert's use adds: to this layer's own z for each decay, and to that of the layers after it.
        own = weights.inputs[index].reshape(experts, decays * rank)
        after = [
            weights.neighbours[index + n, :, n - 1]
            if index + n < layers
            else np.zeros((experts, rank), np.float32)
            for n in range(1, NEIGHBOURS + 1)
        ]
        self._rows = np.ascontiguousarray(np.concatenate([own, *after], 1))
        # forecast = [z | 1 | direct] @ [readout | bias | decayed uses]: one product, its second factor row by row.
        self._factors = np.concatenate([np.ones(rank + 1, np.float32), weights.direct])
        self._z = self._factors[:rank]
        uses = np.zeros((decays, experts), np.float32)
        self._terms = np.concatenate([weights.readout[index].T, weights.bias[index][None], uses])
        self._uses = self._terms[rank + 1 :]
        self._state = np.zeros((decays, rank), np.float32)  # z of each decay
        self._use_decays, self._state_decays = owner.decays[:, :experts], owner.decays[:, experts:]
        self._latest: NDArray[np.intp] = np.zeros(0, np.intp)
        self._added = np.zeros(self._rows.shape[1], np.float32)  # by the latest event, once it is asked for
        self._own = self._added[: decays * rank].reshape(decays, rank)
        self._after = self._added[decays * rank :].reshape(NEIGHBOURS, rank)
        self._forecast = weights.bias[index].copy()
        self._held = np.zeros(experts, np.bool_)
        self._is_added = self._is_settled = True
        self._is_fresh = False  # _forecast is that of the coming event

    def touch(self, experts: Sequence[int]) -> None:
        """See LayerPolicy."""
        self.settle()  # the event before, if nobody refreshed since
        self._latest, self._is_added, self._is_settled = np.array(experts, np.intp), False, False
        self._owner.touched(self._index)

    def insert(self, expert: int) -> None:
        """See LayerPolicy."""
        super().insert(expert)
        self._held[expert] = True

    def remove(self, expert: int) -> None:
        """See LayerPolicy."""
        super().remove(expert)
        self._held[expert] = False

    def victim(self, keep: AbstractSet[int]) -> int | None:
        """See LayerPolicy."""
        if self._owner.current != self._index:  # gives for another layer: its own event is over
            self.settle()
        if not self._is_fresh:
            self.forecast()
        return super().victim(keep)

    def settle(self) -> None:
        """Take the latest event into the layer's history."""
        if self._is_settled:
            return
        self._add()
        used = self._owner.used
        used.fill(0)
        used[self._latest] = 1
        np.multiply(self._uses, self._use_decays, out=self._uses)
        np.add(self._uses, used, out=self._uses)
        np.multiply(self._state, self._state_decays, out=self._state)
        np.add(self._state, self._own, out=self._state)
        self._is_settled, self._is_fresh = True, False

    def outdate(self) -> None:
        """A layer before has something new."""
        self._is_fresh = False

    def added(self, distance: int) -> F32:
        """What the latest event adds to z of the layer that comes so many after this one."""
        self._add()
        row: F32 = self._after[distance - 1]
        return row

    def forecast(self) -> None:
        """For the event after those that are settled."""
        z, owner = self._z, self._owner
        np.dot(owner.ones[: len(self._state)], self._state, out=z)
        for distance, layer in enumerate(owner.before(self._index), 1):
            np.add(z, layer.added(distance), out=z)
        np.dot(self._factors, self._terms, out=self._forecast)
        self._order, self._is_fresh = None, True

    def _add(self) -> None:
        if not self._is_added:
            latest = self._latest
            np.dot(self._owner.ones[: len(latest)], self._rows.take(latest, 0), out=self._added)
            self._is_added = True

    def _sorted(self, resident: set[int]) -> list[int]:
        held = np.flatnonzero(self._held)
        order: list[int] = held[self._forecast.take(held).argsort(kind="stable")].tolist()
        return order
