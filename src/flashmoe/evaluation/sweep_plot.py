"""Quality over bytes: one line for each number of bits, one point for each number of experts."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

from flashmoe.errors import ConfigError

_MARKERS = "osD^vP*X"


def plot_sweep(report: dict[str, Any], path: Path) -> None:
    """Write a PNG: perplexity and divergence over bytes a token, speed beside.

    Raises ConfigError when matplotlib is missing or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'flashmoe[bench]'") from None
    figure = Figure(figsize=(12, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    for i, (bits, found) in enumerate(groupby(report["variants"], lambda row: row["bits"])):
        rows = list(found)
        style = {
            "marker": _MARKERS[i % len(_MARKERS)],
            "linewidth": 1,
            "label": f"{bits} bit",
            "color": f"C{i}",
        }
        weight = [row["token_nbytes"] / 1e6 for row in rows]
        left.plot(weight, [row["perplexity"] for row in rows], **style)
        kept = [(x, row["mean_kl"]) for x, row in zip(weight, rows, strict=True) if row["mean_kl"] > 0]
        middle.plot([x for x, _ in kept], [kl for _, kl in kept], **style)
        right.plot([row["tok_s"]["median"] for row in rows], [row["perplexity"] for row in rows], **style)
        for row in rows:
            label = f"k={row['experts_per_token']}"
            left.annotate(label, (row["token_nbytes"] / 1e6, row["perplexity"]), fontsize=7, xytext=(4, 3),
                          textcoords="offset points")  # fmt: skip
    left.set(xlabel="MB read a token", ylabel="perplexity", yscale="log")
    middle.set(xlabel="MB read a token", ylabel="KL from the best, nats a token", yscale="log")
    right.set(xlabel="tok/s, decode", ylabel="perplexity", yscale="log")
    for axes in (left, middle, right):
        axes.grid(visible=True, which="both", linewidth=0.3)
    left.legend(fontsize=8)
    text = report["text"]
    figure.suptitle(
        f"{Path(report['source']).name}: {text['positions']} positions of {Path(text['file']).name}, "
        f"{report['machine']['processor']}, {report['machine']['threads']} threads",
        fontsize=9,
    )
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: choose another --plot file") from None
