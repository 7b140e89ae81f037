"""How often each expert was asked for, and the file that remembers it for the next start (docs/format.md, 9)."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

_MAGIC = b"flashmoe-usage 1"
_HEAD = len(_MAGIC) + 8 + 4  # magic, xxh3 of all that follows, bytes of the JSON header; little-endian
_MAX_NBYTES = 64 << 20  # 60 layers of 512 experts take 123 KB
# Counts halve within so many tokens: a few conversations.  On recorded routing of OLMoE-1B-7B anything from 2,048
# tokens up covers the next prompt equally well (docs/experiments.md, 27 November 2026).
HALF_LIFE = 8192

Counts = NDArray[np.float32]


class DamagedUsageError(ValueError):
    """A usage file of ours that is not whole: it may be replaced."""


class UsageCounts:
    """Uses of each expert by tokens, prompts included; older ones count less.

    One thread adds; read and save when it does not.
    """

    def __init__(self, experts: Mapping[int, int]) -> None:
        """experts: layer -> how many it has."""
        self._past = {layer: np.zeros(count, np.float32) for layer, count in experts.items()}
        self._fresh = {layer: np.zeros(count, np.float32) for layer, count in experts.items()}
        self._first = next(iter(experts), None)
        self.tokens = 0  # added since the file was read

    def add(self, layer: int, chosen: NDArray[np.int32]) -> None:
        """chosen [tokens, k]: what a step asks of the layer; 2 us."""
        fresh = self._fresh[layer]
        fresh += np.bincount(chosen.ravel(), minlength=len(fresh))
        if layer == self._first:
            self.tokens += len(chosen)

    def counts(self, layer: int) -> Counts:
        """Uses of each expert of the layer [experts], those of earlier runs halved for every HALF_LIFE tokens."""
        counts: Counts = self._past[layer] * np.float32(0.5 ** (self.tokens / HALF_LIFE)) + self._fresh[layer]
        return counts

    def favourites(self, slots: int) -> dict[int, list[int]]:
        """layer -> its most used experts, the most used last; every layer may have the same share of the slots."""
        share = slots // len(self._past) if self._past else 0
        chosen = {}
        for layer in self._past:
            counts = self.counts(layer)
            order = np.argsort(counts, kind="stable")[max(0, len(counts) - share) :]
            chosen[layer] = [int(expert) for expert in order if counts[expert] > 0]
        return chosen

    def save(self, path: Path, identity: str) -> None:
        """Write them for the bundle that is named so; the file is whole or as it was.  Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        sizes = {str(layer): len(counts) for layer, counts in self._past.items()}
        header = json.dumps({"identity": identity, "experts": sizes}).encode()
        body = len(header).to_bytes(4, "little") + header
        body += b"".join(self.counts(layer).astype("<f4").tobytes() for layer in self._past)
        data = _MAGIC + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little") + body
        descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(partial).replace(path)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise

    def load(self, path: Path, identity: str) -> None:
        """Begin with the counts of a file.

        Raises OSError, DamagedUsageError, or ValueError when it is not a usage file of this very bundle.
        """
        header, payload = _parse(path)
        if header.get("identity") != identity:
            raise ValueError("belongs to another bundle")
        sizes = {str(layer): len(counts) for layer, counts in self._past.items()}
        values = np.frombuffer(payload, "<f4") if len(payload) % 4 == 0 else np.empty(0, "<f4")
        if header.get("experts") != sizes or len(values) != sum(sizes.values()):
            raise DamagedUsageError("has other layers than the bundle")
        if not np.isfinite(values).all() or (values < 0).any():
            raise DamagedUsageError("holds counts that are none")
        start = 0
        for counts in self._past.values():
            counts[:] = values[start : start + len(counts)]
            start += len(counts)


def _parse(path: Path) -> tuple[dict[str, Any], bytes]:
    """(header, counts) of a file whose checksum matches.  Raises OSError or ValueError."""
    with path.open("rb") as file:
        data = file.read(_MAX_NBYTES + 1)
    if data[: len(_MAGIC)] != _MAGIC:
        raise ValueError("is no usage file")
    digest, body = data[len(_MAGIC) : len(_MAGIC) + 8], data[len(_MAGIC) + 8 :]
    if len(data) > _MAX_NBYTES or xxhash.xxh3_64_intdigest(body).to_bytes(8, "little") != digest:
        raise DamagedUsageError("is damaged")
    end = 4 + int.from_bytes(body[:4], "little")
    try:
        header = json.loads(body[4:end])
    except (ValueError, RecursionError):
        raise DamagedUsageError("is damaged") from None
    if not isinstance(header, dict):
        raise DamagedUsageError("is damaged")
    return header, body[end:]
