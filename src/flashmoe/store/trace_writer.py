"""Recording which experts are asked for while a model runs."""

from __future__ import annotations

import os
import tempfile
import zipfile
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.errors import TraceError
from flashmoe.store.trace import DECODE, FORMAT, PREFILL, VERSION, header_bytes

_COPY_BYTES = 1 << 20


class TraceWriter:
    """Collects steps and writes one .npz when closed; memory grows by 13 bytes a token only.

    Ids and weights go to nameless files beside the target, so an interrupted process leaves nothing behind.
    Not thread-safe.
    """

    def __init__(self, path: Path, layers: Sequence[int], experts: int, per_token: int, model: str) -> None:
        """layers: those that have experts, in the order in which a step visits them.  Raises TraceError."""
        self.path = path
        self._layers, self._experts, self._k, self._model = tuple(layers), experts, per_token, model
        self._dtype = np.dtype(np.uint8 if experts <= 256 else np.uint16)
        if path.is_dir():
            raise TraceError(f"{path}: is a directory: name the trace's file")
        try:
            self._ids, self._weights = (_nameless(path.parent) for _ in range(2))
        except OSError as error:
            raise TraceError(f"{path}: cannot be written ({error.strerror}): choose another file") from error
        self._token_ids, self._sequences = array("i"), array("i")
        self._steps, self._phases = array("i"), array("B")
        self._pending: list[tuple[list[int], int, int]] = []  # (tokens, sequence, phase) of the step at hand
        self._seen: dict[int, tuple[NDArray[Any], NDArray[Any]]] = {}
        self._places: dict[
            int, tuple[int, int]
        ] = {}  # place -> (its sequence, the position where that goes on)
        self._step = self._begun = 0
        self._closed = False

    def begin(self, parts: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        """A step begins; of each part its place (any number), its position before, and its tokens.

        One token is decoding, more are a prompt.  Whoever does not go on where its place stopped is a new sequence.
        The step before is dropped if a read failed before its last layer.
        """
        self._pending, self._seen = [], {}
        for place, position, ids in parts:
            sequence, expected = self._places.get(place, (0, -1))
            if position != expected:
                sequence, self._begun = self._begun, self._begun + 1
            self._places[place] = sequence, position + len(ids)
            self._pending.append((list(ids), sequence, DECODE if len(ids) == 1 else PREFILL))

    def layer(self, layer: int, chosen: NDArray[Any], weights: NDArray[Any]) -> None:
        """What the layer's router picked: chosen, weights [tokens, k] of all the step's tokens.  Raises TraceError."""
        if self._closed or not self._pending:
            return
        self._seen[layer] = (chosen.astype(self._dtype), weights.astype(np.float16))
        if layer == self._layers[-1] and len(self._seen) == len(self._layers):
            self._finish()

    def close(self) -> None:
        """Write the file, whole or not at all.  Harmless when repeated.  Raises TraceError."""
        if self._closed:
            return
        self._closed = True
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            with open(partial, "xb") as file:
                self._write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise TraceError(
                f"{self.path}: the trace cannot be written ({error.strerror}): free some space"
            ) from error
        finally:
            self._ids.close()
            self._weights.close()

    def _finish(self) -> None:
        ids = np.stack([self._seen[layer][0] for layer in self._layers], 1)  # [tokens, layers, k]
        weights = np.stack([self._seen[layer][1] for layer in self._layers], 1)
        try:
            self._ids.write(ids.tobytes())
            self._weights.write(weights.tobytes())
        except OSError as error:
            raise TraceError(f"{self.path}: cannot record ({error.strerror}): free some space") from error
        for tokens, sequence, phase in self._pending:
            self._token_ids.extend(tokens)
            self._sequences.extend([sequence] * len(tokens))
            self._steps.extend([self._step] * len(tokens))
            self._phases.extend([phase] * len(tokens))
        self._step += 1
        self._pending, self._seen = [], {}

    def _write(self, file: IO[bytes]) -> None:
        tokens = len(self._token_ids)
        shape = (tokens, len(self._layers), self._k)
        header = {
            "format": FORMAT,
            "version": VERSION,
            "model": self._model,
            "layers": list(self._layers),
            "experts": self._experts,
        }
        small: dict[str, NDArray[Any]] = {
            "header": header_bytes(header),
            "token_id": np.array(self._token_ids, np.int32),
            "sequence_id": np.array(self._sequences, np.int32),
            "step": np.array(self._steps, np.int32),
            "phase": np.array(self._phases, np.uint8),
        }
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, values in small.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, values, version=(1, 0))
            _copy(archive, "expert_ids", self._ids, self._dtype, shape)
            _copy(archive, "router_weights", self._weights, np.dtype(np.float16), shape)


def _nameless(folder: Path) -> IO[bytes]:
    return tempfile.TemporaryFile(dir=folder)


def _copy(
    archive: zipfile.ZipFile, name: str, source: IO[bytes], dtype: np.dtype[Any], shape: tuple[int, ...]
) -> None:
    """A spooled array as a member, piece by piece."""
    source.seek(0)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, header)
        while piece := source.read(_COPY_BYTES):
            member.write(piece)
