"""How records are read: in one piece or in two, and how many at a time."""

from __future__ import annotations

from pathlib import Path

from flashmoe.bench.experiments.base import Plain, UnavailableError, Variant, exchange, native_reader
from flashmoe.bench.experiments.threaded import PatientReader
from flashmoe.engine.loading import Parts
from flashmoe.errors import ReadError
from flashmoe.store.reader import NativeReader, Read

_BLOCK = 4096


class SplitReader(PatientReader):
    """Reads a record as gate_up and down, two reads of `inner`; the record is complete when both are.

    cuts: bytes of a record -> where it is cut, a multiple of 4096.  Not thread-safe.
    """

    def __init__(self, inner: NativeReader, cuts: dict[int, int]) -> None:
        super().__init__()
        self._inner, self._cuts = inner, cuts
        self._left: dict[int, tuple[int, str]] = {}  # tag -> reads that are missing, what went wrong

    def _begin(self, read: Read, tag: int) -> None:
        file, offset, nbytes, buffer, at = read
        cut = self._cuts.get(nbytes, 0)
        self._left[tag] = (2 if cut else 1), ""
        if cut:
            self._inner.submit((file, offset, cut, buffer, at), tag)
        self._inner.submit((file, offset + cut, nbytes - cut, buffer, at + cut), tag)

    def _wait_for_some(self) -> list[tuple[int, str]]:
        whole: list[tuple[int, str]] = []
        while not whole and (parts := self._inner.wait()):
            whole = self._whole(parts)
        return whole

    def _what_has_ended(self) -> list[tuple[int, str]]:
        return self._whole(self._inner.poll())

    def _whole(self, parts: list[tuple[int, str]]) -> list[tuple[int, str]]:
        """The records of which no part is missing any more."""
        whole = []
        for tag, error in parts:
            missing, earlier = self._left.pop(tag)
            if missing == 1:
                whole.append((tag, earlier or error))
            else:
                self._left[tag] = missing - 1, earlier or error
        return whole


def install_split(parts: Parts, setting: str, scratch: Path | None) -> Variant:
    """Cuts lie at the last block boundary before the down matrix, which direct reads demand."""
    layers = parts.bundle.expert_layers
    cuts = {layer.record_nbytes: layer.ffn.down_offset // _BLOCK * _BLOCK for layer in layers}
    inner = native_reader(parts)
    exchange(parts, reader=SplitReader(inner, cuts))
    return Plain(inner)


def install_uring(parts: Parts, setting: str, scratch: Path | None) -> Variant:
    """As many reads in one io_uring as the default has threads in pread(2)."""
    try:
        reader = native_reader(parts, engine="uring")
    except ReadError as error:
        raise UnavailableError(str(error)) from error
    exchange(parts, reader=reader)
    return Plain(reader)


def install_depth(parts: Parts, setting: str, scratch: Path | None) -> Variant:
    """setting: how many reads the drive gets at a time."""
    reader = native_reader(parts, int(setting))
    exchange(parts, reader=reader)
    return Plain(reader)
