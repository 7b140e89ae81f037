"""Pictures of replays: hit rate by pool size, and by layer and domain how far above LRU's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashmoe.bench.replay import BELADY, BYPASS
from flashmoe.bench.simulate import BASE
from flashmoe.errors import ConfigError
from flashmoe.store.policies.registry import DEFAULT, label_of

Row = dict[str, Any]
# Fifteen policies lie within five points of each other: only what one looks for first is drawn in strong colours.
_STRONG = ("tab:red", "tab:orange", "tab:purple", "tab:pink", "tab:cyan")
_MARKERS = "ovs^D<P>X*"


@dataclass(frozen=True)
class _Look:
    """How one policy is drawn everywhere."""

    label: str
    color: Any
    marker: str
    width: float
    dashes: str = "-"

    def line(self) -> dict[str, Any]:
        return {
            "color": self.color,
            "linestyle": self.dashes,
            "linewidth": self.width,
            "marker": self.marker,
            "markersize": 4,
        }


def plot_replays(rows: Sequence[Row], title: str, path: Path) -> None:
    """Write a PNG of simulate()'s rows.  Raises ConfigError without matplotlib, or when it cannot be written."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'flashmoe[bench]'") from None
    sizes = sorted({row["slots"] for row in rows})
    middle = sizes[len(sizes) // 2]
    some = sorted((row for row in rows if row["slots"] == middle), key=lambda row: -row["hit_rate"])
    looks = _looks([row["policy"] for row in some])
    figure = Figure(figsize=(16, 6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = 3 if all("by_domain" in row for row in rows) else 2
    axes = figure.subplots(1, panels)
    _by_slots(axes[0], rows, looks, sizes)
    _above_base(axes[1], some, looks, "by_layer", "layer")
    axes[1].set_title(f"by layer, {middle} slots")
    if panels == 3:
        _above_base(axes[2], some, looks, "by_domain", "domain")
        axes[2].set_title(f"by domain, {middle} slots")
    figure.suptitle(title, fontsize=11)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=9, title=f"best first, {middle} slots")
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: choose another --plot file") from None


def _looks(names: Sequence[str]) -> dict[str, _Look]:
    """In the order of the names, which is that of the legend."""
    from matplotlib import colormaps

    strong, pale = iter(_STRONG * len(names)), 0
    looks = {}
    for name in names:
        label = label_of(name)
        if name in (BELADY, BYPASS):
            looks[name] = _Look(label, "black", "", 1.4, "--" if name == BELADY else ":")
        elif name == BASE:
            looks[name] = _Look(label, "black", ".", 2.0)
        elif name == DEFAULT:
            looks[name] = _Look(f"{label} (default)", "tab:green", ".", 2.4)
        elif ":" in name:
            looks[name] = _Look(label, next(strong), ".", 2.4)
        else:
            color = colormaps["tab20"](2 * (pale % 10) + 1)
            looks[name] = _Look(label, color, _MARKERS[pale % len(_MARKERS)], 0.8)
            pale += 1
    return looks


def _by_slots(axes: Any, rows: Sequence[Row], looks: dict[str, _Look], sizes: list[int]) -> None:
    for name, look in looks.items():
        points = sorted((row["slots"], 100 * row["hit_rate"]) for row in rows if row["policy"] == name)
        axes.plot(*zip(*points, strict=True), label=look.label, **look.line())
    axes.set(xlabel="slots for each layer", ylabel="hit rate, %", title="by pool size", xticks=sizes)
    axes.grid(visible=True, linewidth=0.3)


def _above_base(axes: Any, rows: list[Row], looks: dict[str, _Look], key: str, what: str) -> None:
    """Points of hit rate above BASE in each layer or domain."""
    from matplotlib.ticker import MaxNLocator

    base = next(row[key] for row in rows if row["policy"] == BASE)
    numbers = [int(n) for n in base]
    for row in rows:
        gains = [100 * (row[key][n] - base[n]) for n in base]
        axes.plot(numbers, gains, **looks[row["policy"]].line())
    axes.set(xlabel=what, ylabel=f"points above {BASE}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=True, linewidth=0.3)
