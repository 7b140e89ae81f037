"""Policies by name: what --policy takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flashmoe.errors import ConfigError, TraceError
from flashmoe.store.policies.arc import Arc
from flashmoe.store.policies.base import LayerPolicy, Policy
from flashmoe.store.policies.duel import Duel, Score
from flashmoe.store.policies.flashmoe_net import FlashMoeNet, NetworkWeights
from flashmoe.store.policies.forecast import Forecast, ForecastWeights
from flashmoe.store.policies.layered import Layered
from flashmoe.store.policies.learned_file import Learned, load_learned
from flashmoe.store.policies.lecar import LeCaR
from flashmoe.store.policies.lfu import Lfu
from flashmoe.store.policies.lfu_decay import LfuDecay
from flashmoe.store.policies.lrfu import Lrfu
from flashmoe.store.policies.lru import Lru
from flashmoe.store.policies.lru_k import LruK
from flashmoe.store.policies.pairwise import Pairwise
from flashmoe.store.policies.s3_fifo import S3Fifo
from flashmoe.store.policies.sieve import Sieve
from flashmoe.store.policies.slru import Slru
from flashmoe.store.policies.static_set import StaticSet
from flashmoe.store.policies.w_tinylfu import WTinyLfu


@dataclass(frozen=True)
class LayerPolicies:
    """One history's policies of all layers, and what refreshes them."""

    layer: Callable[[int], LayerPolicy]
    refresh: Callable[[], None] | None = None

    def together(self) -> Policy:
        """As one policy of layers that share a pool."""
        return Layered(self.layer, self.refresh)


def _alike(make: Callable[[], LayerPolicy]) -> Callable[[], LayerPolicies]:
    return lambda: LayerPolicies(lambda layer: make())


def _duelling() -> LayerPolicies:
    score = Score()
    return LayerPolicies(lambda layer: Duel(score), score.refresh)


_ALIKE: dict[str, Callable[[], LayerPolicy]] = {
    "lru": Lru,
    "lfu": Lfu,
    "lfu-in-cache": lambda: Lfu(in_cache=True),
    "lfu-decay": LfuDecay,
    "slru": Slru,
    "lru-2": LruK,
    "lrfu": Lrfu,
    "arc": Arc,
    "lecar": LeCaR,
    "s3-fifo": S3Fifo,
    "sieve": Sieve,
    "w-tinylfu": WTinyLfu,
}
# Those that need no file.
SIMPLE: dict[str, Callable[[], LayerPolicies]] = {
    **{name: _alike(make) for name, make in _ALIKE.items()},
    "duel": _duelling,
}
DEFAULT = "duel"  # without training: docs/decisions/010
LEARNED, STATIC = "learned", "static"
AUTO = "auto"
IN_BUNDLE = "experts.policy"  # the trained policy that a bundle carries


@dataclass(frozen=True)
class Geometry:
    """Of a model: what a trained policy must fit.  identity "" fits any: replay compares models on purpose."""

    layers: tuple[int, ...]
    experts: int
    identity: str = ""


def chosen(spec: str, bundle: Path) -> str:
    """What `auto` stands for: the trained policy that the bundle's directory carries, or DEFAULT; else spec itself."""
    if spec != AUTO:
        return spec
    file = bundle / IN_BUNDLE
    return f"{LEARNED}:{file}" if file.exists() else DEFAULT


def label_of(spec: str) -> str:
    """A policy's spec with the bare name of its file, for tables and plots."""
    name, _, file = spec.partition(":")
    return f"{name}:{Path(file).name}" if file else name


def policy_maker(spec: str, geometry: Geometry) -> Callable[[], LayerPolicies]:
    """Policies with no history, as often as called.

    spec: a name of SIMPLE, learned:FILE, or static:FILE (the hot set of the same file).  Raises ConfigError for
    unknown names, TraceError when the file cannot be read or was made for another model.
    """
    name, _, file = spec.partition(":")
    if name in (LEARNED, STATIC) and file:
        learned = load_learned(Path(file))
        _check_fit(file, learned, geometry)
        return learned_maker(learned, geometry, static=name == STATIC)
    make = SIMPLE.get(spec)
    if make is None:
        raise ConfigError(
            f"unknown --policy {spec!r}: leave it out, or choose {', '.join(SIMPLE)}, learned:FILE or static:FILE"
        )
    return make


def learned_maker(
    learned: Learned, geometry: Geometry, *, static: bool = False
) -> Callable[[], LayerPolicies]:
    """As policy_maker, for what was trained just now; static: only its hot set."""
    weights = learned.weights
    index = {layer: i for i, layer in enumerate(learned.layers)}
    if static:
        return lambda: LayerPolicies(lambda layer: StaticSet(learned.counts[index[layer]].tolist()))
    if isinstance(weights, ForecastWeights):
        return lambda: _forecasting(weights)
    if isinstance(weights, NetworkWeights):
        return lambda: LayerPolicies(lambda layer: FlashMoeNet(weights, index[layer]))
    return lambda: LayerPolicies(lambda layer: Pairwise(weights, geometry.experts))


def _forecasting(weights: ForecastWeights) -> LayerPolicies:
    forecast = Forecast(weights)
    return LayerPolicies(forecast.layer, forecast.refresh)


def _check_fit(file: str, learned: Learned, geometry: Geometry) -> None:
    if geometry.identity and learned.model != geometry.identity:
        raise TraceError(
            f"{file}: was trained for another bundle than this one: record a trace of this one and train again, "
            "or name it with `flashmoe cache train --bundle`"
        )
    if learned.kind != "pairwise" and (
        learned.experts != geometry.experts or not set(geometry.layers) <= set(learned.layers)
    ):
        raise TraceError(
            f"{file}: was trained for {len(learned.layers)} layers of {learned.experts} experts, and these are "
            f"{len(geometry.layers)} of {geometry.experts}: train it on a trace of this model"
        )
