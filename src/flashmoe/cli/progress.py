"""One progress line for work measured in bytes (convert, verify, synth) or in tokens (eval)."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class ProgressLine:
    """A bar with what is done, and the time left on stderr, for a ``with`` block; silent without a terminal.

    Calling it reports progress: bytes (or units) done, and in all.  Not thread-safe.
    """

    def __init__(self, what: str, unit: str = "bytes") -> None:
        console = Console(file=sys.stderr)
        counts: list[ProgressColumn] = [DownloadColumn(binary_units=True), TransferSpeedColumn()]
        if unit != "bytes":
            counts = [MofNCompleteColumn(), TextColumn(unit)]
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            *counts,
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(what, total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Show ``done`` of ``total``."""
        self._bar.update(self._task, completed=done, total=total)
