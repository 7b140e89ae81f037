"""Pictures of replays: hit rate by pool size, by domain and by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashmoe.errors import ConfigError


def plot_replays(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Write a PNG of simulate()'s rows.  Raises ConfigError without matplotlib, or when it cannot be written."""
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'flashmoe[bench]'") from None
    names = list(dict.fromkeys(row["policy"] for row in rows))
    palette = colormaps["tab20"]
    colors = {name: "black" if name.startswith("belady") else palette(i % 20) for i, name in enumerate(names)}
    figure = Figure(figsize=(15, 6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = 3 if all("by_domain" in row for row in rows) else 2
    axes = figure.subplots(1, panels)
    _by_slots(axes[0], rows, names, colors)
    middle = sorted({row["slots"] for row in rows})[len({row["slots"] for row in rows}) // 2]
    some = [row for row in rows if row["slots"] == middle]
    _by_layer(axes[1], some, colors, middle)
    if panels == 3:
        _by_domain(axes[2], some, colors, middle)
    figure.suptitle(title, fontsize=11)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: choose another --plot file") from None


def _style(name: str) -> dict[str, Any]:
    if name.startswith("belady"):
        return {"linestyle": "--" if name == "belady" else ":", "linewidth": 1.4}
    return {"linewidth": 2.4 if name.startswith("learned") else 1.0}


def _by_slots(axes: Any, rows: Sequence[dict[str, Any]], names: list[str], colors: dict[str, Any]) -> None:
    for name in names:
        points = sorted((row["slots"], 100 * row["hit_rate"]) for row in rows if row["policy"] == name)
        axes.plot(*zip(*points, strict=True), marker=".", color=colors[name], label=name, **_style(name))
    axes.set(xlabel="slots for each layer", ylabel="hit rate, %", title="by pool size")
    axes.grid(visible=True, linewidth=0.3)


def _by_layer(axes: Any, rows: list[dict[str, Any]], colors: dict[str, Any], slots: int) -> None:
    for row in rows:
        layers, rates = zip(*row["by_layer"].items(), strict=True)
        name = row["policy"]
        axes.plot([int(n) for n in layers], [100 * r for r in rates], color=colors[name], **_style(name))
    axes.set(xlabel="layer", ylabel="hit rate, %", title=f"by layer, {slots} slots")
    axes.grid(visible=True, linewidth=0.3)


def _by_domain(axes: Any, rows: list[dict[str, Any]], colors: dict[str, Any], slots: int) -> None:
    domains = sorted(rows[0]["by_domain"])
    width = 0.85 / len(rows)
    for i, row in enumerate(rows):
        places = [d + (i - len(rows) / 2 + 0.5) * width for d in range(len(domains))]
        axes.bar(places, [100 * row["by_domain"][d] for d in domains], width, color=colors[row["policy"]])
    lowest = min(rate for row in rows for rate in row["by_domain"].values())
    axes.set(xticks=range(len(domains)), xticklabels=[f"domain {d}" for d in domains])
    axes.set(ylabel="hit rate, %", title=f"by domain, {slots} slots", ylim=(100 * lowest - 5, 100))
