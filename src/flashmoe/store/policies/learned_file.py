"""Files of `flashmoe cache train`: a policy's numbers, and the model that they were learned on."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.errors import TraceError
from flashmoe.store.arrays import read_arrays
from flashmoe.store.policies.flashmoe_net import NetworkWeights
from flashmoe.store.policies.forecast import NEIGHBOURS, ForecastWeights
from flashmoe.store.policies.pairwise import FEATURES, PairwiseWeights
from flashmoe.store.trace import header_bytes, parse_header

FORMAT = "flashmoe-policy"
VERSION = 1
Weights = ForecastWeights | NetworkWeights | PairwiseWeights
KINDS: dict[str, type[Any]] = {
    "forecast": ForecastWeights,
    "flashmoe-net": NetworkWeights,
    "pairwise": PairwiseWeights,
}
_RETRAIN = "train it again with `flashmoe cache train`"


@dataclass(frozen=True)
class Learned:
    """A trained policy.

    model: identity of the bundle, "" when the trace did not tell; layers, experts: of that model.
    counts: float32 [layers, experts], uses in the trace.  about: what it was trained on, for people.
    """

    model: str
    layers: tuple[int, ...]
    experts: int
    counts: NDArray[np.float32]
    weights: Weights
    about: dict[str, Any]

    @property
    def kind(self) -> str:
        """Which policy the weights are for."""
        return next(name for name, form in KINDS.items() if isinstance(self.weights, form))


def save_learned(path: Path, learned: Learned) -> None:
    """Write the file, whole or not at all.  Raises TraceError."""
    header = {
        "format": FORMAT,
        "version": VERSION,
        "kind": learned.kind,
        "model": learned.model,
        "layers": list(learned.layers),
        "experts": learned.experts,
        "about": learned.about,
    }
    arrays = {name: value for name, value in asdict(learned.weights).items() if name != "layers"}
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "xb") as file:
            np.savez(file, header=header_bytes(header), counts=learned.counts, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise TraceError(f"{path}: cannot be written ({error.strerror}): choose another file") from error


def load_learned(path: Path) -> Learned:
    """Read and check a file.  Raises TraceError."""
    arrays = read_arrays(path)
    try:
        return _parse(arrays)
    except (ValueError, KeyError, TypeError) as error:
        raise TraceError(f"{path}: no policy that we can read ({error}): {_RETRAIN}") from error


def _parse(arrays: dict[str, NDArray[Any]]) -> Learned:
    header = parse_header(arrays["header"]) if "header" in arrays else {}
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        raise ValueError(f"not version {VERSION} of {FORMAT}")
    layers, experts, kind = header.get("layers"), header.get("experts"), header.get("kind")
    about, model = header.get("about"), header.get("model")
    if not isinstance(layers, list) or not all(type(n) is int for n in layers) or not layers:
        raise ValueError("its layers are no numbers")
    if type(experts) is not int or experts < 1 or not isinstance(model, str) or not isinstance(about, dict):
        raise ValueError("its header lacks experts, model or about")
    form = KINDS.get(kind) if isinstance(kind, str) else None
    if form is None:
        raise ValueError(f"unknown kind {kind!r}")
    counts = _floats(arrays, "counts")
    if counts.shape != (len(layers), experts):
        raise ValueError("counts are not [layers, experts]")
    values: dict[str, Any] = {
        field.name: _floats(arrays, field.name) for field in fields(form) if field.name != "layers"
    }
    if form is not PairwiseWeights:
        values["layers"] = tuple(layers)
    weights = form(**values)
    _check_shapes(weights, len(layers), experts)
    return Learned(model, tuple(layers), experts, counts, weights, about)


def _floats(arrays: dict[str, NDArray[Any]], name: str) -> NDArray[np.float32]:
    array = arrays[name]
    if array.dtype != np.float32 or not np.isfinite(array).all():
        raise ValueError(f"{name} are no finite float32 numbers")
    return array


def _check_shapes(weights: Weights, layers: int, experts: int) -> None:
    if isinstance(weights, PairwiseWeights):
        wanted: dict[str, tuple[int, ...]] = {"weights": (FEATURES,)}
    elif isinstance(weights, NetworkWeights):
        hidden = weights.b1.shape[-1]
        wanted = {"w1": (layers, 2 * experts, hidden), "b1": (layers, hidden)}
        wanted |= {"w2": (layers, hidden, hidden), "b2": (layers, hidden)}
        wanted |= {"w3": (layers, hidden, experts), "b3": (layers, experts)}
    else:
        decays, rank = len(weights.decays), weights.readout.shape[-1]
        wanted = {"decays": (decays,), "direct": (decays,), "inputs": (layers, experts, decays, rank)}
        wanted |= {"neighbours": (layers, experts, NEIGHBOURS, rank), "readout": (layers, experts, rank)}
        wanted |= {"bias": (layers, experts)}
    for name, shape in wanted.items():
        if getattr(weights, name).shape != shape:
            raise ValueError(f"{name} are not {list(shape)}")
