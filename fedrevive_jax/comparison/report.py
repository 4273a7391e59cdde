"""The files of a comparison: tables, pictures, and one HTML page that holds them all."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedrevive_jax.comparison import statistics, tuning
from fedrevive_jax.comparison.statistics import Run, Spread
from fedrevive_jax.comparison.tuning import Choice
from fedrevive_jax.compute import buckets
from fedrevive_jax.config import DEVICE_FIELDS, LOCATION_FIELDS, is_bucket
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.pages import charts, series
from fedrevive_jax.pages import run as run_page
from fedrevive_jax.pages.document import Page
from fedrevive_jax.record import files, plots

NOTES = (
    "Figures are mean ± standard deviation over seeds, on the split that is named above. "
    "Accuracies are told up to the simulated time that all runs of the same world cover, and a "
    "model counts until the next evaluation; versions, staleness, bytes and seconds are those of "
    "whole runs.",
    "final: the last evaluation; best: the highest; last ten: the mean of the last ten evaluations "
    "(a single one is noisy under asynchrony; a method that makes fewer versions may spread them "
    "over more time); area: the mean accuracy over that simulated time; last quarter: the mean "
    "over its last quarter.",
    "time to a: simulated time of the first evaluation at accuracy a or above; in brackets how "
    "many seeds got there, if not all, and then the mean is over those.",
    "final − X, last ten − X, last quarter − X: mean of the differences to X, the first line, seed "
    "by seed, and Student's 95% interval of that mean, which is wide where seeds are few; in "
    "brackets how many seeds have a partner there, if not all.",
    "not paired: these runs are not in the world of the first line (data, split, population, "
    "concurrency, delays, faults, simulated time), so that the same seed does not mean the same.",
    "server ms: milliseconds of a server step, a sample of the arrivals; seconds: wall time with "
    "compilation. Both depend on what else the machine did.",
    "failed: training diverged, or more uploads than `reject_limit` allows were rejected; the "
    "figures are of the other seeds.",
    "sent MB: models that were sent down and up, with feature statistics, in float32.",
)

# What the charts of a page hold: lines of the table, runs each with a curve of its own, and points
# of these curves together. So it stays below 3 MB.
MOST_LABELS, MOST_CURVES, MOST_POINTS = 40, 100, 15_000


class Study(NamedTuple):
    """What a comparison found.

    Attributes:
      title: heading.
      command: the exact command that makes it.
      groups: runs by label; the first is what the others are compared with.
      targets: accuracies whose time is told.
      choices: what tuning chose, by method.
      tuning: in words, at what budget.
      swept: the fields of an ablation.
    """

    title: str
    command: str
    groups: Mapping[str, Sequence[Run]]
    targets: Sequence[float] = ()
    choices: Mapping[str, Choice] | None = None
    tuning: str = ""
    swept: Sequence[str] = ()


# What a comparison writes, beside the folders of its runs.
FILES = ("table.md", "table.csv", "command.txt", "report.html", "curves.png", "staleness.png",
         "by_staleness.png", "ablation.png")  # fmt: skip


def prepare(out: Path) -> None:
    """Makes the folder of a comparison where there is none; a bucket needs none.

    Raises:
      ConfigError: it cannot be made.
    """
    if is_bucket(out):
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("out", out, f"cannot be made ({error.strerror})") from None


def write(out: Path, study: Study) -> str:
    """Writes every file of a comparison into a folder and returns its table as Markdown.

    Raises:
      ConfigError: the folder cannot be made, or the bucket cannot be written.
    """
    prepare(out)
    rows = statistics.table(study.groups, study.targets)
    lines = statistics.cells(rows)
    text = statistics.markdown(lines)
    if study.choices:
        text += f"\n{study.tuning}\n\n" + statistics.markdown(tuning.cells(study.choices))
    texts = {
        "table.md": text,
        "table.csv": statistics.as_csv(rows),
        "command.txt": study.command + "\n",
    }
    with buckets.updated(out, "out", FILES) as folder:
        for name, content in texts.items():
            data = content.encode()
            files.write_whole(folder / name, lambda stream, data=data: stream.write(data))
        pictures = _pictures(folder, study, rows)
        _page(out, study, lines, pictures).write(folder / "report.html")
    return text


def _pictures(out: Path, study: Study, rows) -> list[tuple[Path, str]]:
    """Draws the pictures; returns the files and captions of those that the page shows, which draws
    the curves itself. Those of an earlier comparison in the same folder that do not belong to this
    one are removed."""
    for name in ("by_staleness.png", "ablation.png"):
        (out / name).unlink(missing_ok=True)
    whole = {
        label: [run.evaluations for run in own if run.summary]
        for label, own in study.groups.items()
    }
    plots.comparison(
        out / "curves.png", study.title, {label: own for label, own in whole.items() if own}
    )
    plots.staleness(
        out / "staleness.png",
        study.title,
        {
            label: np.concatenate([run.staleness for run in own])
            for label, own in study.groups.items()
        },
    )
    found = []
    lines = staleness_lines(study, rows)
    if lines:
        plots.by_staleness(out / "by_staleness.png", study.title, lines)
        found.insert(
            0,
            (out / "by_staleness.png", "Accuracy by how stale the updates were, over seeds."),
        )
    if len(study.swept) == 1:
        (field,) = study.swept
        scores = {
            str(own[0].config.as_dict()[field]): row.spreads["last quarter"]
            for own, row in zip(study.groups.values(), rows, strict=True)
        }
        means = {value: score.mean for value, score in scores.items() if score.seeds}
        plots.sweep(
            out / "ablation.png",
            study.title,
            field,
            means,
            {value: scores[value].deviation for value in means},
        )
        found.insert(0, (out / "ablation.png", f"Accuracy by {field}, over seeds."))
    elif study.swept:
        differences = {
            # Without the method, which all have.
            " ".join(row.label.split()[1:]): row.differences["last quarter"]
            for row in rows
            if row.differences and row.differences["last quarter"].pairs
        }
        left_out = [row.label for row in rows[1:] if not row.differences]
        words = (
            f"Accuracy against {rows[0].label}, seed by seed: the mean of the differences and its "
            "95% interval."
        )
        if left_out:
            words += f" Not paired, and left out: {', '.join(left_out)}."
        if differences:
            plots.differences(out / "ablation.png", study.title, rows[0].label, differences)
            found.insert(0, (out / "ablation.png", words))
    return found


# What goes with the concurrency when the number of arrivals stays.
WITH_CONCURRENCY = (
    "concurrency",
    "max_time",
    "max_versions",
    "eval_every",
    "eval_interval",
    "checkpoint_every",
    "beta_s_max",
)
# FedAvg waits for all.
OF_A_ROUND = ("buffer_size", "open_slots")


def staleness_lines(study: Study, rows) -> dict[str, list[tuple[float, Spread]]]:
    """Mean staleness and accuracy of groups that differ in concurrency alone, by their label;
    empty where there are no such groups."""

    def settings(config):
        free = {"seed", *WITH_CONCURRENCY, *LOCATION_FIELDS, *DEVICE_FIELDS}
        free |= set(OF_A_ROUND) if config.cohort else set()
        return {name: value for name, value in config.as_dict().items() if name not in free}

    firsts = [own[0] for own in study.groups.values()]
    kept = [settings(run.config) for run in firsts]
    lines: dict[str, list[tuple[float, Spread]]] = {}
    concurrencies: dict[str, set[int]] = {}
    for run, config, row in zip(firsts, kept, rows, strict=True):
        alike = [c for c, other in zip(kept, firsts, strict=True) if other.name == run.name]
        label = statistics.label_of(run.name, config, alike)
        staleness, accuracy = row.spreads["staleness"], row.spreads["last quarter"]
        if accuracy.seeds:
            lines.setdefault(label, []).append((staleness.mean, accuracy))
            concurrencies.setdefault(label, set()).add(run.config.concurrency)
    if all(len(values) == 1 for values in concurrencies.values()):
        return {}
    return {label: sorted(line) for label, line in lines.items()}


def _page(out: Path, study: Study, lines, pictures) -> Page:
    """The report: everything in one file, pictures as data."""
    runs = [run for own in study.groups.values() for run in own]
    datasets = sorted({run.config.dataset for run in runs})
    devices = {run.summary["device"] for run in runs if run.summary}
    seeds = sorted({run.config.seed for run in runs})
    splits = sorted({run.config.eval_split for run in runs})
    page = Page(study.title)
    page.text(
        f"Data set {' and '.join(datasets)}, {' and '.join(splits)} split; seeds "
        f"{', '.join(map(str, seeds))}; device {', '.join(sorted(devices)) or 'unknown'}."
    )
    page.code(study.command)
    page.table(lines)
    for path, caption in pictures:
        page.picture(path.name, path.read_bytes(), caption)
    _add_curves(page, study.groups, seeds)
    if study.choices:
        page.heading("Chosen settings")
        page.text(study.tuning)
        page.table(tuning.cells(study.choices))
    page.heading("Settings in which they differ")
    page.table(_settings(study.groups))
    made = _made_images(study.groups)
    if made:
        page.heading("Images that the server made, without data")
        for label, (name, data) in made.items():
            page.picture(name, data, f"{label}.")
    linked = _linked(out, study.groups)
    if linked:
        page.heading("Pages of the runs")
        for label, targets in linked.items():
            page.links(label, targets)
    page.heading("How to read the table")
    page.notes(NOTES)
    return page


def _add_curves(page: Page, groups: Mapping[str, Sequence[Run]], seeds: Sequence[int]) -> None:
    """Accuracy and staleness, to be switched by label and seed."""
    shown = dict(itertools.islice(groups.items(), MOST_LABELS))
    places = {label: place for place, label in enumerate(shown)}
    whole = {label: [run for run in own if run.summary] for label, own in shown.items()}
    whole = {label: own for label, own in whole.items() if own}
    runs = [(label, run) for label, own in whole.items() for run in own]
    page.heading("Curves")
    if len(shown) < len(groups):
        page.text(f"The first {len(shown)} of {len(groups)} lines of the table.")
    page.switches(
        "Methods", "method", {label: (charts.color(place), True) for label, place in places.items()}
    )
    notes = ["Mean over seeds; the band is one standard deviation."]
    curves = []
    if len(runs) <= MOST_CURVES:
        names = {"mean": ("", True)} | {str(seed): ("", False) for seed in seeds}
        page.switches("Mean and seeds", "seed", names)
        most = MOST_POINTS // max(len(runs), 1)
        for label, run in runs:
            at = series.spaced(len(run.evaluations), most)
            rows = [run.evaluations[place] for place in at]
            fields = ("time", "wall_seconds", "accuracy")
            source = charts.source_of(**{name: series.column(rows, name) for name in fields})
            curves.append((label, run.config.seed, source))
        if any(len(run.evaluations) > most for _, run in runs):
            notes.append(f"Of a seed's curve {most} evaluations are drawn, evenly spaced.")
    else:
        notes.append(f"These are {len(runs)} runs, too many for a curve of each.")
    for key, words in (
        ("time", "simulated time"),
        ("wall_seconds", "wall time in seconds, compilation included"),
    ):
        means = {
            label: plots.mean_curve([run.evaluations for run in own], key)
            for label, own in whole.items()
        }
        if means:
            title = f"accuracy by {words}"
            page.chart(charts.accuracy(key, title, words, means, curves, places), *notes)
    stale = {
        label: series.cumulative(np.concatenate([run.staleness for run in own]))
        for label, own in shown.items()
    }
    title = "staleness of the arrivals, all seeds"
    page.chart(
        charts.shares("staleness", title, "staleness (versions)", stale, places),
        "Methods with the same plan meet the same staleness: one curve covers the other.",
    )


def _settings(groups: Mapping[str, Sequence[Run]]) -> list[list[str]]:
    """The fields in which the groups differ, of each the first run's."""
    configs = [own[0].config.as_dict() for own in groups.values()]
    names = [
        name
        for name in configs[0]
        if name not in ("method", "seed", *LOCATION_FIELDS, *DEVICE_FIELDS)
        and len({c[name] for c in configs}) > 1
    ]
    lines = [["", *groups]]
    for name in names:
        lines.append([name, *(_plain(config[name]) for config in configs)])
    return lines


def _plain(value: object) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    return str(value)


def _made_images(groups: Mapping[str, Sequence[Run]]) -> dict[str, tuple[str, bytes]]:
    """The synthetic images of each group's first run that has some: the file, and what it holds."""
    made = {}
    for label, own in groups.items():
        run = next((run for run in own if run.made), None)
        if run:
            made[label] = f"{run.folder.name}/{statistics.MADE}", run.made
    return made


def _linked(out: Path, groups: Mapping[str, Sequence[Run]]) -> dict[str, list[tuple[str, str]]]:
    """Seed and way to the page of each run that lies below the comparison's folder, by label."""

    def whole(folder: Path) -> Path:
        return folder if is_bucket(folder) else folder.absolute()

    found: dict[str, list[tuple[str, str]]] = {}
    for label, own in groups.items():
        for run in own:
            place = whole(run.folder) / run_page.NAME
            if place.is_relative_to(whole(out)) and place.exists():
                way = place.relative_to(whole(out)).as_posix()
                found.setdefault(label, []).append((f"seed {run.config.seed}", way))
    return found
