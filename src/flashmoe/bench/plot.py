"""The roofline (Williams, Waterman and Patterson 2009): what the machine allows, and where the measurements stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashmoe.errors import ConfigError


def plot_roofline(report: dict[str, Any], path: Path) -> None:
    """Write a PNG.  Raises ConfigError when matplotlib is missing or the file cannot be written."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'flashmoe[bench]'") from None
    rows = report["results"]
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw_bounds(axes, report)
    for row in rows:
        _draw_point(axes, row)
    axes.set(xscale="log", yscale="log", xlabel="multiply-adds per byte of weights and state")
    axes.set_ylabel("10⁹ multiply-adds per second")
    machine = report["machine"]
    axes.set_title(f"{report['model']}: {machine['processor']}, {machine['threads']} threads", fontsize=10)
    axes.grid(visible=True, which="both", linewidth=0.3)
    axes.legend(fontsize=8, loc="lower right")
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: choose another --plot file") from None


def _draw_bounds(axes: Any, report: dict[str, Any]) -> None:
    bandwidth, peak = report["read_bandwidth"], report["int8_peak"]
    reach = [row["intensity"] for row in report["results"]]
    left, right = min([*reach, peak / bandwidth]) / 3, max([*reach, peak / bandwidth]) * 3
    corner = peak / bandwidth
    axes.set_ylim(top=peak / 1e9 * 2)
    axes.plot([left, corner], [left * bandwidth / 1e9, peak / 1e9], "k-", linewidth=1.2)
    axes.plot([corner, right], [peak / 1e9, peak / 1e9], "k-", linewidth=1.2)
    axes.annotate(
        f"{bandwidth / 1e9:.0f} GB/s", (left * 1.4, left * 1.4 * bandwidth / 1e9 * 1.35), fontsize=8
    )
    axes.annotate(f"{peak / 1e9:.0f}·10⁹ int8 multiply-adds/s", (corner * 1.1, peak / 1e9 * 1.12), fontsize=8)


def _draw_point(axes: Any, row: dict[str, Any]) -> None:
    per_token = row["work_per_token"] * (row["intensity"] if row["kind"] == "decode" else 1.0)
    speed = row["tok_s"]["median"]
    marker = "o" if row["kind"] == "decode" else "s"
    line = axes.plot(
        [row["intensity"]], [speed * per_token / 1e9], marker, label=f"{row['name']}: {speed:.4g} tok/s"
    )
    if "peer_tok_s" in row:
        theirs = row["peer_tok_s"]["median"]
        axes.plot(
            [row["intensity"]],
            [theirs * per_token / 1e9],
            marker,
            markerfacecolor="none",
            markeredgecolor=line[0].get_color(),
            label=f"llama.cpp: {theirs:.4g} tok/s",
        )
