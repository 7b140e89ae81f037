"""`flashmoe run --stats`: what the picture shows, that text is whole beside it, and the table in the end."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from flashmoe.cli import live, main
from flashmoe.store.stats import CacheStats, LayerCounts


class Store:
    """Counters that a test moves on."""

    def __init__(self) -> None:
        self.now = CacheStats({0: LayerCounts(), 1: LayerCounts()}, 0, 0, 0.0, 0.0)

    def __call__(self) -> CacheStats:
        return self.now


class Clock:
    seconds = 100.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(live, "time", clock)
    return clock


def test_the_picture_is_of_the_last_seconds(clock: Clock) -> None:
    store = Store()
    view = live.StatsView(store)
    store.now = CacheStats({0: LayerCounts(0, 40), 1: LayerCounts(0, 40)}, 9 << 30, 0, 1.0, 2.0)
    for second in (100.5, 101, 102):
        clock.seconds = second
        view._picture()
    view.count(30)
    clock.seconds = 104.0
    store.now = CacheStats(
        {0: LayerCounts(30, 50, 0, 0.5), 1: LayerCounts(0, 120, 0, 0.1)}, (9 << 30) + 4 * 10**9, 0, 2.6, 8.4
    )
    rows = [str(line) for line in view._picture().renderables]
    assert rows == [
        "15.0 tok/s, hits 25%, stalled 30%, 2.00 GB/s, drive busy 80%, queue depth 4.0",
        "hits    ▆ ",
        "stalled ▄▁",
    ]


def test_totals_and_layers_are_of_the_whole_answer(clock: Clock) -> None:
    store = Store()
    store.now = CacheStats({0: LayerCounts(5, 5), 1: LayerCounts(5, 5)}, 100, 0, 1.0, 1.0)
    view = live.StatsView(store)
    clock.seconds += 10
    store.now = CacheStats({0: LayerCounts(8, 6, 0, 1.0), 1: LayerCounts(5, 5)}, 10**9 + 100, 0, 6.0, 21.0)
    assert view.totals() == {
        "hit_rate": 0.75,
        "stall_share": 0.1,
        "drive_busy_share": 0.5,
        "bytes_per_second": 1e8,
        "queue_depth": 4.0,
    }
    assert view.layers() == [
        {"layer": 0, "hits": 3, "misses": 1, "hit_rate": 0.75, "stall_share": 0.1},
        {"layer": 1, "hits": 0, "misses": 0, "hit_rate": None, "stall_share": 0.0},
    ]


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("short", None),
        ("one\ntwo", ("one", "two")),
        ("\n", ("", "")),
        ("twelve cells more", ("twelve", "cells more")),
        ("abcdefghijklmnop", ("abcdefghi", "jklmnop")),
        ("abcdefghi jk", ("abcdefghi", "jk")),
        ("漢字漢字漢字", ("漢字漢字", "漢字")),
        ("twelve cells\nmore", ("twelve", "cells\nmore")),
    ],
)
def test_rows_of_a_terminal(text: str, row: tuple[str, str] | None) -> None:
    assert live._first_row(text, 10) == row


def test_in_one_terminal_text_and_picture_share_the_screen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = io.StringIO()
    view = live.StatsView(Store())
    view._console = Console(file=screen, force_terminal=True, width=20, color_system=None)
    view._shared = True
    text = "Once upon a time there was a [bold]mouse[/bold].\nThe end."
    for piece in text.replace("p", "p|").split("|"):
        view.write(piece, 1)
    view.__exit__(None, None, None)
    shown = screen.getvalue() + capsys.readouterr().out
    assert shown == "Once upon a time\nthere was a\n[bold]mouse[/bold].\nThe end."


def test_the_table_goes_to_stderr_and_the_text_is_the_same(
    demo_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(demo_bundle), "Tell me", "--max-tokens", "8", "--temperature", "0", "--expert-slots", "25%"]
    assert main(["run", *words]) == 0
    plain = capsys.readouterr()
    assert main(["run", *words, "--stats"]) == 0
    out, err = capsys.readouterr()
    assert out == plain.out
    assert "layer" in err
    assert "all layers: hits " in err
    assert "queue depth" in err
    assert err.splitlines()[-1].count("tok/s") >= 1
    assert main(["run", *words, "--stats", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["text"] == plain.out.rstrip("\n")
    assert [row["layer"] for row in report["layers"]] == list(range(30))
    assert sum(row["misses"] for row in report["layers"]) > 0
    assert report["totals"]["queue_depth"] > 0
