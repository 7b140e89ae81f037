"""Warm start: the experts that earlier runs used most are read before anybody asks, and this run's uses are kept."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from flashmoe import env
from flashmoe.store.cache import ExpertCache
from flashmoe.store.usage import DamagedUsageError, UsageCounts
from flashmoe.store.warm_start import WarmStart

AUTO, OFF = "auto", "off"


def usage_path(wanted: str | Path, identity: str) -> Path | None:
    """The file for `auto` (in the user's cache directory), a path, or none at all for `off`."""
    if wanted == OFF:
        return None
    if wanted == AUTO:
        return env.user_cache_dir() / "flashmoe" / "usage" / identity
    return Path(wanted)


class Warming:
    """One engine's usage file and what is done with it.  Used by the engine's thread.

    Neither a bit of the output nor the memory budget depends on it: only slots that are free are filled.
    """

    def __init__(self, path: Path | None, identity: str, experts: dict[int, int]) -> None:
        """experts: layer -> how many it has; identity: of the bundle."""
        self._path = path if experts else None
        self._identity = identity
        self.counts: UsageCounts | None = None if self._path is None else UsageCounts(experts)
        self.notice = ""  # one line for the user: why a file was not used or not written
        self._reading: WarmStart | None = None
        if self._path is not None and self._path.exists():
            self._load(self._path)

    def begin(self, cache: ExpertCache, slots: int, record_nbytes: int) -> None:
        """Start reading, if there is anything to go by."""
        if self.counts is None:
            return
        favourites = self.counts.favourites(slots)
        if any(favourites.values()):
            self._reading = WarmStart(cache, favourites, record_nbytes)

    def step(self) -> AbstractContextManager[object]:
        """Around whatever uses the cache or its reader."""
        return nullcontext() if self._reading is None else self._reading

    @property
    def reading(self) -> bool:
        """Whether experts are still to be read ahead."""
        return self._reading is not None and self._reading.running

    def end(self) -> None:
        """Stop reading and keep the counts.  Harmless when repeated."""
        if self._reading is not None:
            self._reading.stop()
            self._reading = None
        if self.counts is None or self._path is None or not self.counts.tokens:
            return
        try:
            self.counts.save(self._path, self._identity)
        except OSError as error:
            self.notice = (
                f"{self._path}: usage counts were not saved ({error.strerror}): name another --usage-file"
            )
        self.counts = None

    def _load(self, path: Path) -> None:
        assert self.counts is not None
        begin_anew = False
        try:
            self.counts.load(path, self._identity)
            return
        except DamagedUsageError as error:
            why, begin_anew = str(error), True
        except ValueError as error:
            why = str(error)
        except OSError as error:
            why = str(error.strerror)
        self.notice = f"{path}: usage counts were not used ({why})"
        if begin_anew:
            self.notice += ": they begin anew"
        else:  # never write over what is not ours, however the path was meant
            self.notice += ": name another --usage-file"
            self._path = self.counts = None
