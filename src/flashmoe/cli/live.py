"""`flashmoe run --stats`: layers and drive at work, live below the streamed text, and as a table in the end."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple, Self

from rich.cells import cell_len
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from flashmoe.store.stats import CacheStats

_WINDOW_SECONDS = 2.0  # what "now" means: some ten tokens of a model that streams
_REFRESH = 4  # pictures a second; one costs 0.3 ms of a processor with 40 layers
_BARS = " ▁▂▃▄▅▆▇█"
_ROWS = 20  # of the table, before it goes on in another column


class _Moment(NamedTuple):
    seconds: float
    tokens: int
    store: CacheStats


class StatsView:
    """Watches one answer.  A context manager; text goes through `write`, and is on stdout as without it.

    Live only where stderr is a terminal; `close` prints the table in every case.  Not thread-safe, apart from the
    thread that redraws.
    """

    def __init__(self, cache_stats: Callable[[], CacheStats]) -> None:
        """cache_stats: counters so far, from any thread."""
        self._stats = cache_stats
        self._console = Console(stderr=True)
        self._shared = self._console.is_terminal and sys.stdout.isatty()  # one terminal shows both
        self._line = ""  # of the answer: what is not yet a whole row
        self._tokens = 0
        self._begin = _Moment(time.monotonic(), 0, cache_stats())
        self._moments = deque([self._begin])
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(
                console=self._console,
                get_renderable=self._picture,
                refresh_per_second=_REFRESH,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        if self._shared and self._line:  # the picture is gone, the row that it held is not
            sys.stdout.write(self._line)
            sys.stdout.flush()

    def write(self, text: str, tokens: int) -> None:
        """The next piece of the answer, and how many tokens it took."""
        self._tokens += tokens
        if not self._shared:
            sys.stdout.write(text)
            sys.stdout.flush()
            return
        self._line += text
        while (row := _first_row(self._line, self._console.width)) is not None:
            shown, self._line = row
            self._console.print(Text(shown), soft_wrap=True, highlight=False)

    def count(self, tokens: int) -> None:
        """Tokens whose text is shown elsewhere."""
        self._tokens += tokens

    def layers(self) -> list[dict[str, Any]]:
        """Each layer since the beginning (JSON values)."""
        seconds, done = self._since_begin()
        return [
            {
                "layer": layer,
                "hits": counts.hits,
                "misses": counts.misses,
                "hit_rate": counts.hit_rate,
                "stall_share": counts.stall_seconds / seconds,
            }
            for layer, counts in done.layers.items()
        ]

    def totals(self) -> dict[str, Any]:
        """The whole model since the beginning (JSON values); bytes a second of the whole time, not only of reading."""
        return _totals(*self._since_begin())

    def close(self) -> None:
        """The table, on stderr."""
        rows = self.layers()
        tables = []
        for begin in range(0, len(rows), _ROWS):
            table = Table("layer", "hits", "stalled", box=None, padding=(0, 1))
            for column in table.columns:
                column.justify = "right"
            for row in rows[begin : begin + _ROWS]:
                table.add_row(str(row["layer"]), _percent(row["hit_rate"]), _percent(row["stall_share"]))
            tables.append(table)
        self._console.print(Columns(tables, padding=(0, 4)))
        self._console.print(f"all layers: {_describe(self.totals())}", highlight=False, soft_wrap=True)

    def _since_begin(self) -> tuple[float, CacheStats]:
        return time.monotonic() - self._begin.seconds, self._stats().since(self._begin.store)

    def _picture(self) -> Group:
        now = _Moment(time.monotonic(), self._tokens, self._stats())
        self._moments.append(now)
        while len(self._moments) > 2 and now.seconds - self._moments[1].seconds >= _WINDOW_SECONDS:
            self._moments.popleft()
        then = self._moments[0]
        seconds = max(now.seconds - then.seconds, 1e-9)
        lately = now.store.since(then.store)
        speed = (now.tokens - then.tokens) / seconds
        lines = [Text(self._line)] if self._shared else []
        lines.append(Text(f"{speed:.1f} tok/s, {_describe(_totals(seconds, lately))}", style="bold"))
        layers = list(lately.layers.values())
        lines.append(Text("hits    " + _bars([counts.hit_rate or 0.0 for counts in layers])))
        # A full bar: waited for as long as is this layer's even share of the time.
        stalls = [counts.stall_seconds / seconds * len(layers) for counts in layers]
        lines.append(Text("stalled " + _bars(stalls)))
        for line in lines:
            line.truncate(self._console.width)
        return Group(*lines)


def _totals(seconds: float, store: CacheStats) -> dict[str, Any]:
    total = store.total
    return {
        "hit_rate": total.hit_rate,
        "stall_share": total.stall_seconds / seconds,
        "drive_busy_share": store.busy_seconds / seconds,
        "bytes_per_second": store.bytes_read / seconds,
        "queue_depth": store.queue_depth,
    }


def _describe(totals: dict[str, Any]) -> str:
    depth = totals["queue_depth"] or 0.0
    return (
        f"hits {_percent(totals['hit_rate'])}, stalled {_percent(totals['stall_share'])}, "
        f"{totals['bytes_per_second'] / 1e9:.2f} GB/s, drive busy {_percent(totals['drive_busy_share'])}, "
        f"queue depth {depth:.1f}"
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _bars(shares: list[float]) -> str:
    """A character a layer."""
    return "".join(_BARS[min(len(_BARS) - 1, round(share * (len(_BARS) - 1)))] for share in shares)


def _first_row(text: str, width: int) -> tuple[str, str] | None:
    """(a whole row of the terminal, what follows it); None while the text may still grow on its row."""
    line, newline, rest = text.partition("\n")
    if cell_len(line) < width:
        return (line, rest) if newline else None
    cells = end = 0
    while cells + cell_len(line[end]) < width:
        cells += cell_len(line[end])
        end += 1
    blank = line.rfind(" ", 1, end + 1)
    if blank > 0:
        return line[:blank], text[blank + 1 :]
    return line[:end], text[end:]
