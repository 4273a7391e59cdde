"""The page of a run, made from its record alone; also of one that is under way or has failed."""

import contextlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedrevive_jax.errors import ConfigError, FileError
from fedrevive_jax.pages import charts, series
from fedrevive_jax.pages.document import Page
from fedrevive_jax.record import derived, files
from fedrevive_jax.record.health import Health

NAME = "report.html"
# Rows of the table of clients.
MOST_CLIENTS = 200
KINDS = ("evaluation", "dfkd", "pool")
LOSSES = ("feature", "one_hot", "adversarial", "synthesis")
GENERATOR = ("generator_teacher", "generator_student", "generator_diversity")
# What is told in one chart: (title, what the axis is, fields of metrics.jsonl).
TERMS = (
    ("synthesis", "loss", LOSSES),
    ("distillation", "loss", ("distillation",)),
    ("samples whose judges are convinced", "share", ("agreement",)),
    ("distilled update", "‖Δ^KD‖", ("distilled_norm",)),
    ("cosine of Δ^KD and Δ", "cosine", ("distilled_cosine",)),
    (
        "steps in which the loss guard rejected a term", "share",
        tuple(f"{name}_rejected" for name in (*LOSSES[:3], "distillation")),
    ),
    (
        "due and moved nothing", "1 where it was so",
        ("synthesis_skipped", "distillation_skipped"),
    ),
    ("training of the generator", "loss", GENERATOR),
)  # fmt: skip


class Recorded(NamedTuple):
    """What a run's folder holds.

    Attributes:
      config: config.json, also of another version of the package.
      evaluations, dfkd, pool: rows of metrics.jsonl by kind.
      arrivals: rows of arrivals.jsonl.
      summary: summary.json; None for a run that is not finished.
      trouble: why it had to stop, if it had to.
      classes: names of the classes, where they are known.
      live: whether its time is in seconds.
    """

    config: dict[str, Any]
    evaluations: list[series.Row]
    dfkd: list[series.Row]
    pool: list[series.Row]
    arrivals: list[series.Row]
    summary: dict[str, Any] | None
    trouble: str
    classes: tuple[str, ...]
    live: bool


def read(folder: Path, summary: dict[str, Any] | None = None) -> Recorded:
    """Reads a run's folder, whoever is writing it; a last line that is not whole is left out.

    Args:
      folder: the run's.
      summary: stands in for summary.json, which is written last.

    Raises:
      ConfigError: it holds no run, or a damaged one.
    """
    config = files.read_json(folder / files.CONFIG)
    if not isinstance(config, dict):
        raise ConfigError("workdir", folder, f"{files.CONFIG} is not a configuration")
    if summary is None and (folder / files.SUMMARY).exists():
        summary = files.read_json(folder / files.SUMMARY)
    metrics = files.read_rows(folder / files.METRICS)
    arrivals = files.read_rows(folder / files.ARRIVALS)
    classes: tuple[str, ...] = ()
    with contextlib.suppress(FileError):  # of another version of the package
        classes = derived.read_sources(folder).classes
    health = Health(config.get("reject_limit", math.inf))
    for row in metrics:
        health.metrics(row)
    for row in arrivals:
        health.arrival(row)
    kinds = {kind: [row for row in metrics if row["kind"] == kind] for kind in KINDS}
    return Recorded(
        config=config,
        evaluations=kinds["evaluation"],
        dfkd=kinds["dfkd"],
        pool=kinds["pool"],
        arrivals=arrivals,
        summary=summary,
        trouble=str(health.trouble or ""),
        classes=classes,
        live=(folder / "delays.csv").exists(),
    )


def write(folder: Path, summary: dict[str, Any] | None = None) -> None:
    """Writes report.html into a run's folder; see `read`.

    Raises:
      ConfigError, OSError: it cannot be read or written.
    """
    page(folder, summary).write(folder / NAME)


def page(folder: Path, summary: dict[str, Any] | None = None, stamp: str | None = None) -> Page:
    """The page of a run.

    Args:
      folder, summary: see `read`.
      stamp: see `Page`.

    Raises:
      ConfigError: see `read`.
    """
    try:
        return _page(folder, read(folder, summary), stamp)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            "workdir",
            folder,
            f"the record is damaged or of another version of fedrevive_jax ({error!r})",
        ) from error


def _page(folder: Path, run: Recorded, stamp: str | None) -> Page:
    config = run.config
    title = f"{config['method']} on {config['dataset']}, seed {config['seed']}"
    found = Page(title, stamp, pictures=600_000)
    found.text(_standing(run))
    if run.summary:
        found.table([["figure", "value"], *_told(run.summary)], folded="Figures of the run")
    found.table([["setting", "value"], *_told(config)], folded="Settings")
    axis = "seconds since the start" if run.live else "simulated time"
    if run.evaluations:
        _add_evaluations(found, run, axis)
    # All charts over the arrivals' time move together.
    if run.arrivals:
        _add_arrivals(found, run, axis)
    if run.dfkd or run.pool:
        _add_dfkd(found, run, axis)
    pictures = folder / "synthetic.png"
    if pictures.is_file():
        found.heading("Images that the server made, without data")
        found.picture(
            pictures.name, pictures.read_bytes(), "The newest of each class in the pool at the end."
        )
    if run.arrivals:
        _add_clients(found, run)
    return found


def _standing(run: Recorded) -> str:
    """How far a run has come, in words."""
    versions = max([row["version"] for row in (*run.evaluations, *run.arrivals)], default=0)
    if run.summary is not None:
        accuracy = run.summary["final_accuracy"]
        return (
            f"Finished: accuracy {accuracy:.4f}, best {run.summary['best_accuracy']:.4f}, after "
            f"{run.summary['versions']} versions and {run.summary['arrivals']} arrivals."
        )
    far = f"version {versions}, {len(run.arrivals)} arrivals"
    if run.trouble:
        return f"Failed at {far}: {run.trouble}."
    return f"Not finished: the record goes up to {far}."


def _told(values: dict[str, Any]) -> list[list[str]]:
    return [[name, _plain(value)] for name, value in values.items()]


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(own)}" for name, own in value.items()) or "none"
    return str(value)


def _thinned(shown: int, there: int, what: str) -> str:
    return f"{shown} of {there} {what}, evenly spaced." if shown < there else ""


def _add_evaluations(found: Page, run: Recorded, axis: str) -> None:
    found.heading("Accuracy and loss")
    places = series.spaced(len(run.evaluations), series.MOST_POINTS)
    rows = [run.evaluations[place] for place in places]
    note = _thinned(len(rows), len(run.evaluations), "evaluations")
    times = series.column(rows, "time")
    first = charts.line("accuracy", axis, "accuracy", times, series.column(rows, "accuracy"))
    found.chart(first, note, half=True)
    second = charts.line(
        "loss", axis, "loss", times, series.column(rows, "loss"), x_range=first.x_range
    )
    found.chart(second, note, half=True)


def _add_arrivals(found: Page, run: Recorded, axis: str) -> None:
    rows, time = run.arrivals, series.column(run.arrivals, "time")
    found.heading("Arrivals")
    found.text("These charts share their time: zoom into one, and all show that part.")
    shared: dict[str, Any] = {}
    for place, (name, words) in enumerate((
        ("staleness", "staleness (versions)"),
        ("beta", "β, the weight of what was distilled"),
        ("loss", "client's mean training loss"),
    )):  # fmt: skip
        values = series.column(rows, name)
        if name == "beta" and not np.any(values > 0):
            continue
        shown = series.binned(time, values)
        if not len(shown.x):
            continue
        chart = charts.values(f"arrivals/{name}", axis, words, shown, place, **shared)
        shared = {"x_range": chart.x_range}
        note = ""
        if shown.per > 1:
            note = (
                f"A line through the means of {shown.per} arrivals in a row; the band holds the "
                "middle 80% of them."
            )
        found.chart(chart, note, half=True)
    rejected = series.rejections(rows)
    if rejected:
        total = sum(row.get("rejected") is not None for row in rows)
        chart = charts.terms(
            "rejections", "rejected uploads so far, by reason", axis, "uploads", rejected,
            mode="after", **shared,
        )  # fmt: skip
        found.chart(chart, f"{total} of {len(rows)} uploads were rejected.", half=True)
    jobs = series.timeline(rows)
    note = "A bar is a job, from its start to the arrival of its upload; red ones were rejected."
    if all(row.get("start") is None for row in rows):
        note = "The record does not tell when jobs started: a mark is an arrival."
    if len(jobs.jobs) < jobs.all_jobs:
        note += (
            f" Shown are {len(jobs.jobs)} of {jobs.all_jobs} jobs, of {len(jobs.clients)} of "
            f"{jobs.all_clients} clients, evenly spaced by number."
        )
    found.chart(charts.jobs(axis, jobs, **shared), note)


def _add_dfkd(found: Page, run: Recorded, axis: str) -> None:
    end = max(row["time"] for row in (*run.evaluations, *run.arrivals, *run.pool, *run.dfkd))
    pool = series.pool(run.pool, end)
    shown = []
    for title, words, names in TERMS:
        curves, per = {}, 1
        for name in names:
            own = [row for row in run.dfkd if row.get(name) is not None]
            if own and (not name.endswith(("_rejected", "_skipped")) or any(r[name] for r in own)):
                thin = series.binned(series.column(own, "time"), series.column(own, name))
                curves[name], per = (thin.x, thin.y), max(per, thin.per)
        if curves:
            shown.append((title, words, curves, per))
    if pool is None and not shown:
        return
    found.heading("Data-free distillation")
    shared: dict[str, Any] = {}
    if pool is not None:
        chart = charts.pool(axis, pool, run.classes)
        shared = {"x_range": chart.x_range}
        note = "Counted at evaluations; a count stands until the next one."
        found.chart(chart, note, _thinned(len(pool.starts), pool.all_moments, "counts"))
    for title, words, curves, per in shown:
        chart = charts.terms(title, title, axis, words, curves, **shared)
        shared = {"x_range": chart.x_range}
        found.chart(chart, f"Means of up to {per} rows in a row." if per > 1 else "", half=True)


def _add_clients(found: Page, run: Recorded) -> None:
    lines = series.clients(run.arrivals)
    found.heading("Clients")
    if len(lines) > MOST_CLIENTS:
        found.text(f"The {MOST_CLIENTS} of {len(lines)} clients that sent most.")
    header = ["client", "arrivals", "mean staleness", "mean training loss", "rejected"]
    body = [
        [
            str(line.number), str(line.arrivals), f"{line.staleness:.2f}",
            f"{line.loss:.4f}" if math.isfinite(line.loss) else "–", str(line.rejected),
        ]
        for line in lines[:MOST_CLIENTS]
    ]  # fmt: skip
    found.table([header, *body])
