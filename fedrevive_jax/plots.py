"""The pictures of a run. Matplotlib without a display."""

from pathlib import Path
from typing import Any

import numpy as np


def _figure(*args, **kwargs):
    from matplotlib.figure import Figure

    # Figure objects bypass pyplot and its global state.
    figure = Figure(*args, layout="constrained", **kwargs)
    return figure


def curves(path: Path, title: str, evaluations: list[dict[str, Any]], staleness: list[int]) -> None:
    """Accuracy against simulated time and against version, and the staleness of the arrivals."""
    figure = _figure(figsize=(12, 3.6))
    by_time, by_version, histogram = figure.subplots(1, 3)
    accuracy = [row["accuracy"] for row in evaluations]
    for axes, key, label in (
        (by_time, "time", "simulated time"),
        (by_version, "version", "global version"),
    ):
        axes.plot([row[key] for row in evaluations], accuracy, color="tab:blue", linewidth=1.5)
        axes.set_xlabel(label)
        axes.set_ylabel("accuracy")
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
    if staleness:
        top = max(staleness)
        bins = np.arange(-0.5, top + 1.5, max(1, (top + 1) // 40))
        histogram.hist(staleness, bins=bins, color="tab:orange")
        mean = float(np.mean(staleness))
        histogram.axvline(mean, color="black", linestyle="--", linewidth=1)
        histogram.set_title(f"mean {mean:.1f}", fontsize=10)
    histogram.set_xlabel("staleness (versions)")
    histogram.set_ylabel("arrivals")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def comparison(path: Path, title: str, runs: dict[str, list[list[dict[str, Any]]]]) -> None:
    """Accuracy against simulated and against wall time: mean over seeds, a band of one deviation.

    Args:
      path: where to write it.
      title: above the picture.
      runs: by label, the evaluations of every seed.
    """
    figure = _figure(figsize=(12, 4.4))
    by_time, by_wall = figure.subplots(1, 2, sharey=True)
    for axes, key, words in (
        (by_time, "time", "simulated time"),
        (by_wall, "wall_seconds", "wall time in seconds, compilation included"),
    ):
        for position, (label, seeds) in enumerate(runs.items()):
            ends = [rows[-1][key] for rows in seeds]
            at = np.linspace(0.0, min(ends), 200)
            curves = [
                np.interp(at, [r[key] for r in rows], [r["accuracy"] for r in rows])
                for rows in seeds
            ]
            mean, spread = np.mean(curves, axis=0), np.std(curves, axis=0)
            style = _style(position)
            axes.plot(at, mean, label=label, linewidth=1.5, **style)
            axes.fill_between(
                at, mean - spread, mean + spread, color=style["color"], alpha=0.15, linewidth=0
            )
        axes.set_xlabel(words)
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
    by_time.set_ylabel("accuracy")
    figure.legend(*by_time.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def staleness(path: Path, title: str, values: dict[str, np.ndarray]) -> None:
    """The share of arrivals that are at most so stale, for each label; one line is the same plan.

    Args:
      path: where to write it.
      title: above the picture.
      values: by label, tau of the arrivals of all seeds.
    """
    figure = _figure(figsize=(7, 4.4))
    axes = figure.subplots()
    for position, (label, taus) in enumerate(values.items()):
        if len(taus):
            at = np.sort(taus)
            share = np.arange(1, len(at) + 1) / len(at)
            words = f"{label}, mean {at.mean():.1f}"
            axes.step(at, share, where="post", label=words, linewidth=1.5, **_style(position))
    axes.set_xlabel("staleness (versions)")
    axes.set_ylabel("share of arrivals at most so stale")
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    axes.set_title(title)
    figure.savefig(path, dpi=120)


def sweep(
    path: Path, title: str, field: str, means: dict[str, float], deviations: dict[str, float]
) -> None:
    """One figure over the values of a field: points and bars of one deviation.

    Args:
      path: where to write it.
      title: above the picture.
      field: the field.
      means, deviations: by value, as text; NaN is left out.
    """
    figure = _figure(figsize=(5.5, 4))
    axes = figure.subplots()
    spreads = [0.0 if np.isnan(deviations[value]) else deviations[value] for value in means]
    axes.errorbar(
        range(len(means)), list(means.values()), yerr=spreads, fmt="o", capsize=4, color="tab:blue"
    )
    axes.set_xticks(range(len(means)), list(means))
    axes.set_xlabel(field)
    axes.set_ylabel("accuracy, mean of the last ten evaluations")
    axes.margins(x=0.15)
    axes.grid(alpha=0.3)
    axes.set_title(title)
    figure.savefig(path, dpi=120)


def _style(position: int) -> dict[str, Any]:
    """Ten colours, then the same ten dashed."""
    return {"color": f"C{position % 10}", "linestyle": "-" if position < 10 else "--"}


def synthetic(path: Path, images: np.ndarray, labels: np.ndarray, num_classes: int) -> bool:
    """A grid of pool images, a row per class, newest first. False when there is nothing to show.

    Args:
      path: where to write it.
      images: [n, height, width, channels], bytes or floats in [0, 1], oldest first.
      labels: int [n].
      num_classes: classes of the data set; at most 20 rows are drawn.
    """
    columns, shown = 10, [c for c in range(num_classes) if (labels == c).any()][:20]
    if not shown:
        return False
    images = images.astype(np.float32) / 255 if images.dtype == np.uint8 else images
    figure = _figure(figsize=(columns * 0.7, len(shown) * 0.7 + 0.4))
    grid = figure.subplots(len(shown), columns, squeeze=False)
    for row, label in zip(grid, shown, strict=True):
        newest = images[labels == label][::-1][:columns]
        for axes, image in zip(row, newest, strict=False):
            axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        for axes in row:
            axes.set_xticks([])
            axes.set_yticks([])
            for side in axes.spines.values():
                side.set_visible(False)
        row[0].set_ylabel(str(label), rotation=0, labelpad=10, va="center")
    figure.suptitle("pool images by class, newest first", fontsize=10)
    figure.savefig(path, dpi=120)
    return True
