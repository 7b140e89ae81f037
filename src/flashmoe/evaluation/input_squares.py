"""Mean squares of every matrix's input over a text, as llama.cpp's imatrix has them, for convert/importance.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from flashmoe.bundle.codecs import FfnLayout, dequantize_ffn
from flashmoe.bundle.reader import Bundle
from flashmoe.bundle.writer import write_whole
from flashmoe.evaluation.scoring import F32, F64
from flashmoe.nn.weights import I32

# An expert that saw n tokens has its own mean squares with the weight n, and its layer's with the weight of so many.
_SHARED_TOKENS = 16


class InputSquares:
    """An engine.observer.Watcher that sums squares, float64.  Memory: 8 bytes for each column of each matrix.

    Inputs between the two products of a feed-forward block are computed here, in float32 from dequantised weights.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._layouts = {layer.layer: (layer.ffn, layer.count) for layer in bundle.expert_layers}
        self._sums: dict[str, F64] = {}  # [cols], of experts [experts, cols]
        self._tokens: dict[str, F64] = {}  # [1] or [experts]

    def matrix(self, name: str, x: F32) -> None:
        """See Watcher."""
        self._add(name, x, 0, 1)

    def record(self, name: str, x: F32) -> None:
        """See Watcher."""
        layout = self._bundle.tensor(name).codec
        assert isinstance(layout, FfnLayout)
        self._add(f"{name}.gate_up", x, 0, 1)
        self._add(f"{name}.down", _hidden(x, dequantize_ffn(layout, self._bundle.read(name))), 0, 1)

    def experts(self, layer: int, x: F32, chosen: I32) -> None:
        """See Watcher."""
        layout, count = self._layouts[layer]
        for expert in np.unique(chosen).tolist():
            mine = x[(chosen == expert).any(axis=1)]
            parts = dequantize_ffn(layout, self._bundle.read_expert(layer, expert))
            self._add(f"experts.{layer}.gate_up", mine, expert, count)
            self._add(f"experts.{layer}.down", _hidden(mine, parts), expert, count)

    def write(self, file: Path) -> None:
        """The means as a safetensors file."""
        means = {name: self._means(name) for name in sorted(self._sums)}
        header: dict[str, object] = {}
        offset = 0
        for name, values in means.items():
            span = [offset, offset + values.nbytes]
            header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": span}
            offset += values.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        size = -(-len(text) // 8) * 8
        data = b"".join(values.astype("<f4").tobytes() for values in means.values())
        write_whole(file, size.to_bytes(8, "little") + text.ljust(size) + data)

    def _means(self, name: str) -> F32:
        sums, tokens = self._sums[name], self._tokens[name]
        if len(tokens) == 1:
            return np.asarray(sums[0] / max(tokens[0], 1), np.float32)
        layer = sums.sum(axis=0) / max(tokens.sum(), 1)
        return np.asarray((sums + _SHARED_TOKENS * layer) / (tokens + _SHARED_TOKENS)[:, None], np.float32)

    def _add(self, name: str, x: F32, row: int, rows: int) -> None:
        if name not in self._sums:
            self._sums[name], self._tokens[name] = np.zeros((rows, x.shape[1])), np.zeros(rows)
        self._sums[name][row] += np.einsum("tc,tc->c", x, x, dtype=np.float64)
        self._tokens[name][row] += len(x)


def _hidden(x: F32, parts: tuple[F32, F32, F32]) -> F32:
    """What the down matrix is multiplied with: silu(gate) * up."""
    gate, up = x @ parts[0].T, x @ parts[1].T
    hidden: F32 = gate / (1 + np.exp(-np.clip(gate, -80, 80))) * up
    return hidden
