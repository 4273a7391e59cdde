"""The pictures of a run. Matplotlib without a display."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def _figure(*args, **kwargs):
    from matplotlib.figure import Figure

    # Figure objects bypass pyplot and its global state.
    figure = Figure(*args, layout="constrained", **kwargs)
    return figure


def _save(figure, path: Path) -> None:
    """Writes a picture. Labels are the user's, and a dollar sign in them is no formula."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
    figure.savefig(path, dpi=120)


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
        histogram.hist(staleness, bins=staleness_bins(max(staleness)), color="tab:orange")
        mean = float(np.mean(staleness))
        histogram.axvline(mean, color="black", linestyle="--", linewidth=1)
        histogram.set_title(f"mean {mean:.1f}", fontsize=10)
    histogram.set_xlabel("staleness (versions)")
    histogram.set_ylabel("arrivals")
    figure.suptitle(title)
    _save(figure, path)


def staleness_bins(top: int) -> np.ndarray:
    """Edges of a histogram of whole numbers from 0 to `top`, in bins of equally many, about 40."""
    step = max(1, (top + 1) // 40)
    return np.arange(-0.5, top + 0.5 + step, step)  # the last bin holds the top


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
            at, mean, spread = mean_curve(seeds, key)
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
    _save(figure, path)


def mean_curve(
    runs: Sequence[list[dict[str, Any]]], key: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Accuracy of several runs on one axis, up to where all are known: (places, mean, deviation).

    Args:
      runs: evaluations of each.
      key: the field that is the axis.
    """
    at = np.linspace(0.0, min(rows[-1][key] for rows in runs), 200)
    curves = [_held(rows, key, at) for rows in runs]
    spread = np.std(curves, axis=0, ddof=min(1, len(curves) - 1))  # as in the table
    return at, np.mean(curves, axis=0), spread


def _held(rows: list[dict[str, Any]], key: str, at: np.ndarray) -> np.ndarray:
    """Accuracy of the newest evaluation at each of `at`: a model stays until the next one."""
    newest = np.searchsorted([row[key] for row in rows], at, side="right") - 1
    return np.asarray([row["accuracy"] for row in rows])[np.maximum(newest, 0)]


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
    _save(figure, path)


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
    axes.set_ylabel("accuracy, mean over the last quarter")
    axes.margins(x=0.15)
    axes.grid(alpha=0.3)
    axes.set_title(title)
    _save(figure, path)


def differences(path: Path, title: str, reference: str, values: dict[str, Any]) -> None:
    """Paired differences in accuracy to a reference, a line each: the mean and its interval.

    Args:
      path: where to write it.
      title: above the picture.
      reference: what they are differences to.
      values: by label, `comparison.Difference`.
    """
    figure = _figure(figsize=(7, 1.4 + 0.32 * len(values)))
    axes = figure.subplots()
    for position, value in enumerate(values.values()):
        if np.isfinite(value.low):
            axes.plot([value.low, value.high], [position] * 2, color="tab:blue", linewidth=1.5)
        axes.plot(value.mean, position, "o", color="tab:blue", markersize=5)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_xlabel(f"accuracy − {reference}, mean over the last quarter")
    axes.grid(axis="x", alpha=0.3)
    axes.set_title(title)
    _save(figure, path)


def by_staleness(path: Path, title: str, lines: dict[str, list[tuple[float, Any]]]) -> None:
    """Accuracy against mean staleness, a line per label and bars of one deviation.

    Args:
      path: where to write it.
      title: above the picture.
      lines: by label, mean staleness and `comparison.Spread` of the accuracy, in ascending order.
    """
    figure = _figure(figsize=(8, 4.4))
    axes = figure.subplots()
    for position, (label, points) in enumerate(lines.items()):
        bars = [0.0 if np.isnan(spread.deviation) else spread.deviation for _, spread in points]
        axes.errorbar(
            [staleness for staleness, _ in points],
            [spread.mean for _, spread in points],
            yerr=bars,
            marker="o",
            markersize=4,
            capsize=3,
            linewidth=1.5,
            label=label,
            **_style(position),
        )
    axes.set_xscale("symlog", linthresh=1)
    met = sorted(
        {float(f"{staleness:.2g}") for points in lines.values() for staleness, _ in points}
    )
    axes.set_xticks(met, [f"{staleness:g}" for staleness in met])
    axes.set_xlabel("mean staleness (versions)")
    axes.set_ylabel("accuracy, mean over the last quarter")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    axes.set_title(title)
    _save(figure, path)


def _style(position: int) -> dict[str, Any]:
    """Ten colours, then the same ten dashed."""
    return {"color": f"C{position % 10}", "linestyle": "-" if position < 10 else "--"}


def clients(path: Path, title: str, class_mixes: np.ndarray) -> None:
    """The class mixes of clients [clients, classes] as shades, a row per client."""
    figure = _figure(figsize=(6, 0.28 * len(class_mixes) + 1.2))
    axes = figure.subplots()
    shades = axes.imshow(class_mixes, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xlabel("class")
    axes.set_ylabel("client")
    axes.set_xticks(range(class_mixes.shape[1]))
    axes.set_yticks(range(len(class_mixes)))
    figure.colorbar(shades, label="share of its samples")
    axes.set_title(title)
    _save(figure, path)


def clock(path: Path, title: str, jobs: list[dict[str, Any]], window_end: float) -> None:
    """The first jobs on the virtual clock, a row per job, in the order of their numbers.

    Args:
      path: where to write it.
      title: above the picture.
      jobs: of each `start`, `train_end` and `arrival` in simulated time, `client`, `base_version`
        and `staleness`, None for a job that does not arrive.
      window_end: jobs that started before this time are in the first window.
    """
    figure = _figure(figsize=(9, 0.26 * len(jobs) + 1.4))
    axes = figure.subplots()
    for row, job in enumerate(jobs):
        color = f"C{job['base_version'] % 10}"
        length = job["train_end"] - job["start"]
        axes.barh(row, length, left=job["start"], color=color, height=0.7)
        upload = job["arrival"] - job["train_end"]
        axes.barh(row, upload, left=job["train_end"], color=color, height=0.7, alpha=0.35)
        late = "" if job["staleness"] is None else f", τ = {job['staleness']}"
        words = f" client {job['client']} from version {job['base_version']}{late}"
        axes.text(job["arrival"], row, words, va="center", fontsize=7)
    axes.axvline(window_end, color="black", linestyle="--", linewidth=1)
    end = max(job["arrival"] for job in jobs)
    axes.set_xlim(0, 1.35 * end)  # room for the words
    axes.set_ylim(len(jobs) - 0.3, -0.7)
    axes.set_xlabel("simulated time; dark: download and training, light: upload")
    axes.set_ylabel("job")
    axes.set_title(title)
    _save(figure, path)


def revival(path: Path, title: str, rows: list[dict[str, Any]], betas: list[float]) -> bool:
    """What DFKD does over a run. False when nothing was distilled.

    Args:
      path: where to write it.
      title: above the picture.
      rows: of `metrics.jsonl`, those of kind `dfkd`.
      betas: of all arrivals, in their order.
    """

    def told(name):
        found = [(row["version"], row[name]) for row in rows if row.get(name) is not None]
        return zip(*found, strict=True) if found else ([], [])

    if not any(row.get("distilled_norm") is not None for row in rows):
        return False
    figure = _figure(figsize=(12, 6.4))
    (agreement, share), (norm, cosine) = figure.subplots(2, 2)
    for axes, name, words in (
        (agreement, "agreement", "samples recognised"),
        (norm, "distilled_norm", "‖Δ^KD‖"),
        (cosine, "distilled_cosine", "cosine of Δ^KD and Δ"),
    ):
        axes.plot(*told(name), ".", markersize=3, color="tab:blue")
        axes.set_xlabel("global version")
        axes.set_ylabel(words)
    agreement.set_ylim(0, 1.02)
    cosine.axhline(0, color="black", linewidth=1)
    window = max(1, len(betas) // 50)
    blended = np.asarray(betas) > 0
    parts = [blended[at : at + window].mean() for at in range(0, len(blended), window)]
    share.step(np.arange(len(parts)) * window, parts, where="post", color="tab:orange")
    share.set_ylim(0, 1.02)
    share.set_xlabel("arrival")
    share.set_ylabel("share of arrivals with β > 0")
    for axes in (agreement, share, norm, cosine):
        axes.grid(alpha=0.3)
    figure.suptitle(f"{title}: β > 0 at {blended.mean():.0%} of the arrivals")
    _save(figure, path)
    return True


def synthetic(path: Path, images: np.ndarray, labels: np.ndarray, num_classes: int) -> bool:
    """A grid of pool images, a row per class, newest first. False when there is nothing to show.

    Args:
      path: where to write it.
      images: [n, height, width, channels], bytes or floats in [0, 1], oldest first. Of other than
        three channels their mean is drawn.
      labels: int [n].
      num_classes: classes of the data set; at most 20 rows are drawn.
    """
    columns, shown = 10, [c for c in range(num_classes) if (labels == c).any()][:20]
    if not shown:
        return False
    images = images.astype(np.float32) / 255 if images.dtype == np.uint8 else images
    if images.shape[-1] != 3:
        images = images.mean(axis=-1)
    figure = _figure(figsize=(columns * 0.7, len(shown) * 0.7 + 0.4))
    grid = figure.subplots(len(shown), columns, squeeze=False)
    for row, label in zip(grid, shown, strict=True):
        newest = images[labels == label][::-1][:columns]
        for axes, image in zip(row, newest, strict=False):
            axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        for axes in row:
            axes.set_xticks([])
            axes.set_yticks([])
            for side in axes.spines.values():
                side.set_visible(False)
        row[0].set_ylabel(str(label), rotation=0, labelpad=10, va="center")
    figure.suptitle("pool images by class, newest first", fontsize=10)
    _save(figure, path)
    return True
