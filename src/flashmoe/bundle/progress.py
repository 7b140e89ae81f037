"""How long-running work reports on itself; the command line draws it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called now and then with the bytes done so far."""

    def __call__(self, done: int, total: int) -> None:
        """``done`` of ``total`` bytes; ``done`` never decreases."""
