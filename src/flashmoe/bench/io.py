"""Random reads of whole experts by the store's own reader, beside what fio gets from the same files in the same run.

First every engine at every queue depth, in turn.  Then, in alternation and as often as asked: the reader with each
engine at the depth that the engine of `flashmoe run` uses and at its best one, and fio's best.  The second part is what
counts: a best of many short measurements is partly luck.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from flashmoe.bench.fio import ENGINES as FIO_ENGINES
from flashmoe.bench.fio import Fio, find_fio
from flashmoe.bundle.reader import Bundle
from flashmoe.engine.loading import QUEUE_DEPTH
from flashmoe.errors import ConfigError, FlashmoeError, ReadError
from flashmoe.store.reader import AlignedBuffer, NativeReader

OUR_ENGINES = ("threads", "uring")
_DRAWN = 4096


@dataclass(frozen=True)
class IoOptions:
    """depths: of the first part; seconds: of one of its measurements, and of one of the second part's.

    places: buffers that ours reads into in turn; None is as many as reads in flight, as in fio.
    """

    depths: Sequence[int] = (1, 2, 4, 8, 16, 32)
    sweep_seconds: float = 0.4
    seconds: float = 1.0
    repeats: int = 7
    places: int | None = None


@dataclass(frozen=True)
class RecordFiles:
    """Files of `counts[i]` records each, all of one size, and what they are."""

    paths: tuple[Path, ...]
    counts: tuple[int, ...]
    record_nbytes: int


@dataclass(frozen=True)
class Contender:
    """Who reads ("flashmoe" or "fio"), with which engine and how many reads in flight."""

    by: str
    engine: str
    queue_depth: int

    def __str__(self) -> str:
        return f"{self.by} {self.engine} at {self.queue_depth}"


Note = Callable[[str], None]


def record_files(bundle: Bundle) -> RecordFiles:
    """The bundle's experts; of layers with other record sizes those of the commonest.  Raises ConfigError."""
    sizes = Counter(layer.record_nbytes for layer in bundle.expert_layers)
    if not sizes:
        raise ConfigError(f"{bundle.path} has no routed experts: name a bundle of a Mixture-of-Experts model")
    [(nbytes, _)] = sizes.most_common(1)
    layers = [layer for layer in bundle.expert_layers if layer.record_nbytes == nbytes]
    files = [(path, layer.records(i)) for layer in layers for i, path in enumerate(layer.paths)]
    return RecordFiles(tuple(path for path, _ in files), tuple(count for _, count in files), nbytes)


def measure(files: RecordFiles, options: IoOptions, note: Note) -> dict[str, Any]:
    """Both parts; JSON values.  `note` hears what is measured.  Raises ReadError."""
    fio, missing = find_fio()
    runs = _Measurements(files, fio, options)
    remarks = [missing] if missing else []
    contenders = [Contender("flashmoe", engine, d) for engine in OUR_ENGINES for d in options.depths]
    if fio is not None:
        contenders += [Contender("fio", engine, d) for engine in FIO_ENGINES for d in options.depths]
    sweep = _sweep(runs, contenders, options, remarks, note)
    report = {
        "record_nbytes": files.record_nbytes,
        "files": len(files.paths),
        "nbytes": sum(files.counts) * files.record_nbytes,
        "io": runs.mode,
        "reason": runs.reason,
        "engine": runs.engine,
        "engine_reason": runs.engine_reason,
        "fio": None if fio is None else fio.version,
        "sweep": [_row(one, [rate]) for one, rate in sweep.items()],
    }
    duel = _duel(runs, _finalists(sweep, runs.engine), options, note)
    return report | _compared(duel, runs.engine) | {"remarks": remarks}


class _Measurements:
    """Reads with any contender.  One arena serves all of ours and has been written to before.

    Where a host copies the data through its cache, more places to read into are slower: 4.0 GB/s with 8 of 1.7 MiB,
    3.8 with 40.
    """

    def __init__(self, files: RecordFiles, fio: Fio | None, options: IoOptions) -> None:
        self._files, self._fio, self._places = files, fio, options.places
        most = max(*options.depths, QUEUE_DEPTH, options.places or 0)
        self._buffer = AlignedBuffer(most * files.record_nbytes, True)
        self._buffer.array()[:] = 0
        self._order = self._draw(np.random.default_rng())  # fio's offsets differ from run to run too
        reader = NativeReader(files.paths, queue_depth=QUEUE_DEPTH)
        self.mode, self.reason = reader.mode, reader.reason
        self.engine, self.engine_reason = reader.engine, reader.engine_reason
        reader.close()

    def rate(self, one: Contender, seconds: float) -> float:
        """Bytes per second.  Raises ReadError or ConfigError, both FlashmoeErrors."""
        if one.by == "fio":
            assert self._fio is not None
            files = self._files
            return self._fio.read(one.engine, one.queue_depth, files.paths, files.record_nbytes, seconds)
        reader = NativeReader(self._files.paths, engine=one.engine, queue_depth=one.queue_depth)
        try:
            return self._read(reader, one.queue_depth, max(self._places or 0, one.queue_depth), seconds)
        finally:
            reader.close()

    def _read(self, reader: NativeReader, queue_depth: int, places: int, seconds: float) -> float:
        """As fio counts: everything that was submitted in `seconds`, until the last of it has come."""
        done, free = 0, deque(range(places))
        began = time.perf_counter()
        for _ in range(queue_depth):
            self._submit(reader, free.popleft())
        while completions := reader.wait():
            more = time.perf_counter() < began + seconds
            for place, error in completions:
                if error:
                    raise ReadError(f"cannot read {error}: run `flashmoe verify` on the bundle")
                done += 1
                free.append(place)
                if more:
                    self._submit(reader, free.popleft())
        return done * self._files.record_nbytes / (time.perf_counter() - began)

    def _submit(self, reader: NativeReader, place: int) -> None:
        nbytes = self._files.record_nbytes
        file, offset = next(self._order)
        reader.submit((file, offset, nbytes, self._buffer, place * nbytes), place)

    def _draw(self, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
        """(file, offset) for ever; drawn many at a time, because one draw takes as long as a small read."""
        counts, nbytes = np.array(self._files.counts), self._files.record_nbytes
        while True:
            files = rng.integers(len(counts), size=_DRAWN)
            records = rng.integers(counts[files])
            yield from zip(files.tolist(), (records * nbytes).tolist(), strict=True)


def _sweep(
    runs: _Measurements, contenders: list[Contender], options: IoOptions, remarks: list[str], note: Note
) -> dict[Contender, float]:
    """One short measurement of each; an engine that is refused here is left out with a remark."""
    rates: dict[Contender, float] = {}
    refused: set[tuple[str, str]] = set()
    # By depth, so that engines of one depth stand side by side in time: drives have moods.
    for one in sorted(contenders, key=lambda one: one.queue_depth):
        if (one.by, one.engine) in refused:
            continue
        note(str(one))
        try:
            rates[one] = runs.rate(one, options.sweep_seconds)
        except FlashmoeError as error:
            if one.by == "flashmoe" and one.engine == "threads":
                raise  # there is nothing simpler to fall back to: the files cannot be read
            refused.add((one.by, one.engine))
            remarks.append(str(error))
    return {one: rate for one, rate in rates.items() if (one.by, one.engine) not in refused}


def _finalists(sweep: dict[Contender, float], engine: str) -> list[Contender]:
    """Of fio's engines and of ours the best of each, and ours at the depth that a run uses; ours first.

    Three of fio's: it times each thread by itself, so that many threads seem faster in a short run than they are.
    """
    finalists = []
    ours = sorted({one.engine for one in sweep if one.by == "flashmoe"}, key=lambda name: name != engine)
    finalists += [Contender("flashmoe", name, QUEUE_DEPTH) for name in ours]
    for by, name in dict.fromkeys((one.by, one.engine) for one in sweep):
        mine = [one for one in sweep if (one.by, one.engine) == (by, name)]
        finalists.append(max(mine, key=sweep.__getitem__))
    return list(dict.fromkeys(finalists))


def _duel(
    runs: _Measurements, finalists: list[Contender], options: IoOptions, note: Note
) -> dict[Contender, list[float]]:
    """Rates of each, in rounds over all, every second round backwards: none always comes after the same one."""
    rates: dict[Contender, list[float]] = {one: [] for one in finalists}
    for i in range(options.repeats):
        for one in finalists if i % 2 == 0 else reversed(finalists):
            note(f"{one}, {i + 1} of {options.repeats}")
            rates[one].append(runs.rate(one, options.seconds))
    return rates


def _compared(duel: dict[Contender, list[float]], engine: str) -> dict[str, Any]:
    """Rows with the median of the rounds' ratios to fio's best.

    "ratio": of the engine that a run uses, at its best depth; "ratio_in_use": at the depth that a run uses.
    """
    theirs = max((rates for one, rates in duel.items() if one.by == "fio"), key=median, default=None)
    rows = [_row(one, rates) for one, rates in duel.items()]
    if theirs is None:
        return {"duel": rows, "ratio": None, "ratio_in_use": None}
    ratios = {one: median(a / b for a, b in zip(duel[one], theirs, strict=True)) for one in duel}
    for row, ratio in zip(rows, ratios.values(), strict=True):
        row["ratio_to_fio"] = ratio
    return {
        "duel": rows,
        "ratio": max(r for one, r in ratios.items() if one.by == "flashmoe" and one.engine == engine),
        "ratio_in_use": ratios[Contender("flashmoe", engine, QUEUE_DEPTH)],
    }


def _row(one: Contender, rates: list[float]) -> dict[str, Any]:
    return {
        "by": one.by,
        "engine": one.engine,
        "queue_depth": one.queue_depth,
        "bytes_per_second": median(rates),
        "low": min(rates),
        "high": max(rates),
    }
