"""The journal of a conversion: what is durably written, so that a killed conversion can go on.

One JSON value a line.  The first line says what is converted and how; each later one adds finished pieces
of a file.  A piece is journaled only after its bytes were synced; a torn last line is dropped.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashmoe.errors import BundleError

_FORMAT = 1

PieceRecord = tuple[int, str]  # (bytes, xxh3 as 16 hex digits)


class Journal:
    """An open, exclusively locked journal.  Not thread-safe."""

    def __init__(self, path: Path) -> None:
        """Open or create; raises BundleError when it cannot be written or another conversion holds it."""
        self.path = path
        self.start: dict[str, Any] | None = None
        self._pieces: dict[str, list[PieceRecord]] = {}
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise BundleError(
                f"cannot write {path} ({error.strerror}): choose another output directory"
            ) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._fd)
            raise BundleError(
                f"{path.parent} is being written by another conversion: wait for it or stop it"
            ) from error
        self._replay()

    def close(self) -> None:
        """Release the lock; the file stays for the next run."""
        os.close(self._fd)

    def remove(self) -> None:
        """Delete the file (the conversion is complete)."""
        self.path.unlink()

    def remove_if_empty(self) -> None:
        """After a failure before begin(): leave no trace, so that dst can be used for something else."""
        if self.start is None:
            self.path.unlink(missing_ok=True)

    def begin(self, start: dict[str, Any]) -> None:
        """Write the first line."""
        self.start = start
        self._append({"journal": _FORMAT, **start})

    def pieces(self, unit: str) -> Sequence[PieceRecord]:
        """Finished pieces of a file, in order."""
        return self._pieces.get(unit, [])

    def add(self, unit: str, pieces: Sequence[PieceRecord]) -> None:
        """Record pieces whose bytes are durable."""
        self._record({"unit": unit, "pieces": list(pieces)})

    def keep(self, unit: str, count: int) -> None:
        """Forget all pieces after the first ``count``."""
        if count == len(self.pieces(unit)):
            return
        self._record({"unit": unit, "keep": count})

    def _record(self, line: dict[str, Any]) -> None:
        self._apply(line)
        self._append(line)

    def _apply(self, line: dict[str, Any]) -> None:
        unit = line["unit"]
        pieces = self._pieces.setdefault(unit, [])
        if "keep" in line:
            del pieces[line["keep"] :]
        pieces += [(nbytes, digest) for nbytes, digest in line.get("pieces", [])]

    def _replay(self) -> None:
        data = self._content()
        good = 0
        for text in data.splitlines(keepends=True):
            try:
                if not text.endswith(b"\n"):
                    break
                line = json.loads(text)
                if self.start is None:
                    self._check_start(line)
                    self.start = line
                else:
                    self._apply(line)
            except (ValueError, LookupError, TypeError):  # torn by a power cut: all before it is good
                break
            good += len(text)
        os.ftruncate(self._fd, good)
        os.lseek(self._fd, good, os.SEEK_SET)

    def _content(self) -> bytes:
        try:
            with os.fdopen(os.dup(self._fd), "rb") as file:
                return file.read()
        except OSError as error:
            raise BundleError(
                f"cannot read {self.path} ({error.strerror}): fix the drive or delete {self.path.parent}"
            ) from error

    def _check_start(self, line: dict[str, Any]) -> None:
        if line["journal"] != _FORMAT:
            raise BundleError(
                f"{self.path} was begun by another flashmoe: delete {self.path.parent} and convert again"
            )

    def _append(self, line: dict[str, Any]) -> None:
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        try:
            while data:
                data = data[os.write(self._fd, data) :]
            os.fdatasync(self._fd)
        except OSError as error:
            raise BundleError(
                f"writing {self.path} failed ({error.strerror}): free some space,"
                " then run the same command again to go on where it stopped"
            ) from error
