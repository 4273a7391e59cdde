"""Comparing runs: figures of each, statistics over seeds, paired differences.

Pure functions on what runs have recorded; nothing here trains or writes.
"""

import csv
import io
import itertools
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from fedrevive_jax.config import DEVICE_FIELDS, LOCATION_FIELDS, Config
from fedrevive_jax.errors import ConfigError, FileError
from fedrevive_jax.record import files
from fedrevive_jax.record.derived import Sources, read_sources
from fedrevive_jax.record.reading import read_config
from fedrevive_jax.running.recorder import read_evaluations

RECENT = 10  # evaluations whose mean is "last ten": a single one is noisy under asynchrony
COVERAGE = 0.95  # of the interval of a difference
NEEDED = {"simulated_time", "device"}  # of a summary; other figures may be missing
MADE = "synthetic.png"
EVALUATED = {"version", "time", "wall_seconds", "accuracy"}
# What a seed means: where these differ, the same seed is another population, delays or test split,
# and a difference seed by seed would not cancel them.
WORLD_FIELDS = (
    "dataset", "eval_split", "num_clients", "partition", "alpha", "samples_per_client",
    "delays", "delay_mean", "delay_spread", "delay_download", "delay_upload", "delay_trace",
    "fault_rate", "fault_kinds", "max_time", "concurrency",
)  # fmt: skip


class Run(NamedTuple):
    """One recorded run.

    Attributes:
      config: its configuration.
      evaluations: rows with version, time, wall_seconds, accuracy, loss.
      summary: what `summary.json` holds; None for a run that failed: it diverged, or reached
        its limit of rejected uploads.
      staleness: int [arrivals], tau of every arrival.
      folder: where it was recorded.
      sources: what it has read, as far as that is known.
      label: what it is called beside others; empty: as its method, see `name`.
      made: a PNG of the images that its server has made; empty where there is none.
    """

    config: Config
    evaluations: list[dict[str, Any]]
    summary: dict[str, Any] | None
    staleness: np.ndarray
    folder: Path
    sources: Sources | None = None
    label: str = ""
    made: bytes = b""

    @property
    def name(self) -> str:
        """The label, or the method."""
        return self.label or self.config.method


def read_run(folder: Path, failed: bool = False) -> Run:
    """Reads a run's folder.

    Raises:
      ConfigError: it holds no run, or one that is not finished and has not failed.
    """
    config, sources = read_config(folder), read_sources(folder)
    summary = None if failed else files.read_json(folder / files.SUMMARY)
    evaluations = read_evaluations(folder)
    arrivals = files.read_rows(folder / files.ARRIVALS)
    sound = all(row.keys() >= EVALUATED for row in evaluations)
    sound &= all("staleness" in row for row in arrivals)
    if not failed:
        sound &= isinstance(summary, dict) and summary.keys() >= NEEDED and bool(evaluations)
    if not sound:
        raise ConfigError(
            "workdir",
            folder,
            f"{files.SUMMARY}, {files.METRICS} or {files.ARRIVALS} is "
            "damaged or of another version of fedrevive_jax",
        )
    staleness = np.asarray([row["staleness"] for row in arrivals], np.int64)
    made = (folder / MADE).read_bytes() if (folder / MADE).is_file() else b""
    return Run(config, evaluations, summary, staleness, folder, sources, made=made)


def grouped(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs by label, each group in the order of its seeds.

    The label is the run's name; where what is called so comes with several
    configurations, beside seeds and places, also the fields in which they differ, see `label_of`.

    Raises:
      ConfigError: two runs of a group have the same seed, or runs on what is called the same data
        were on different data, see `check_sources`.
    """
    runs = list(runs)
    check_sources(runs)
    by_name: dict[str, list[Run]] = {}
    for run in runs:
        by_name.setdefault(run.name, []).append(run)
    groups: dict[str, list[Run]] = {}
    ignored = {"seed", *LOCATION_FIELDS, *DEVICE_FIELDS}
    for name, own in by_name.items():
        settings = [
            {name: value for name, value in run.config.as_dict().items() if name not in ignored}
            for run in own
        ]
        for run, values in zip(own, settings, strict=True):
            groups.setdefault(label_of(name, values, settings), []).append(run)
    for name, own in groups.items():
        own.sort(key=lambda run: run.config.seed)
        for one, other in itertools.pairwise(own):
            if one.config.seed == other.config.seed:
                raise FileError(
                    f"{one.folder} and {other.folder}", f"are both {name}, seed {one.config.seed}"
                )
    return groups


def check_sources(runs: Iterable[Run]) -> None:
    """Whether runs on one data set, or with one trace of delays, have read the same.

    Else neither the mean over seeds nor the difference to another method would mean anything.

    Raises:
      FileError: they have not; it names two folders.
    """
    first: dict[tuple[str, str], tuple[str, Run]] = {}
    for run in runs:
        if run.sources is None:
            continue
        read = {("data", run.config.dataset): run.sources.data_sha256}
        if "delay_trace" in run.sources.inputs:
            trace = os.path.realpath(run.config.delay_trace)
            read["delays", trace] = run.sources.inputs["delay_trace"]
        for (kind, name), digest in read.items():
            expected, other = first.setdefault((kind, name), (digest, run))
            if digest != expected:
                raise FileError(
                    f"{other.folder} and {run.folder}",
                    f"were run on different {kind}, both called {name} (SHA-256 {expected[:12]} "
                    f"and {digest[:12]}), and must not be compared",
                )


def label_of(name: str, settings: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """What some settings are called, and the fields in which others of the same name differ.

    Where several fields differ, but all others differ from the first in one field at most, that
    field alone is named, and none for the first.
    """
    names = [field for field in settings if len({other[field] for other in others}) > 1]

    def changed(other):
        return [field for field in names if other[field] != others[0][field]]

    if len(names) > 1 and all(len(changed(other)) <= 1 for other in others):
        names = changed(settings)
    return " ".join([name, *(f"{field}={settings[field]}" for field in names)])


# --- figures of one run ---------------------------------------------------------------------------


def last_mean(evaluations: Sequence[Mapping[str, Any]], count: int = RECENT) -> float:
    """Mean accuracy of the last `count` evaluations, of all where there are fewer."""
    return statistics.fmean(row["accuracy"] for row in evaluations[-count:])


def last_quarter(evaluations: Sequence[Mapping[str, Any]], horizon: float) -> float:
    """Mean accuracy over simulated time from 3/4 of `horizon` to `horizon`, of the curve of `area`:
    with one horizon the same time for all methods, however often they make a version."""
    return _mean_over(evaluations, 0.75 * horizon, horizon)


def time_to(evaluations: Sequence[Mapping[str, Any]], target: float) -> float:
    """Simulated time of the first evaluation at or above an accuracy; infinite if there is none."""
    return next((row["time"] for row in evaluations if row["accuracy"] >= target), math.inf)


def area(evaluations: Sequence[Mapping[str, Any]], horizon: float) -> float:
    """Mean accuracy over simulated time from 0 to `horizon`: the area under the curve, divided.

    The curve stays at an evaluation's accuracy until the next one: a straight line between them
    would credit a method that seldom makes a version with models that do not exist yet.
    """
    return _mean_over(evaluations, 0.0, horizon)


def _mean_over(evaluations: Sequence[Mapping[str, Any]], start: float, end: float) -> float:
    times = np.asarray([row["time"] for row in evaluations])
    accuracies = np.asarray([row["accuracy"] for row in evaluations])
    edges = np.concatenate([[start], times[(times > start) & (times < end)]])
    newest = np.searchsorted(times, edges, side="right") - 1
    held = accuracies[np.maximum(newest, 0)]
    if end <= start:
        return float(held[0])
    return float(held @ np.diff(edges, append=end) / (end - start))


def covered(run: Run) -> float:
    """The simulated time that a run covers: all that it was given, though nothing may have arrived
    at the end of it, or up to the version at which it had to stop."""
    summary = run.summary or {}
    stopped = summary.get("versions", 0) >= run.config.max_versions
    return summary["simulated_time"] if stopped else run.config.max_time


def common_end(runs: Iterable[Run]) -> float:
    """The simulated time that all runs cover that did not fail; 0 where all failed."""
    return min((covered(run) for run in runs if run.summary), default=0.0)


def figures(run: Run, targets: Sequence[float] = (), horizon: float | None = None) -> dict:
    """Every figure of the table for one run, by the name of its column.

    NaN where it is not known: all of a run that failed, and what a run did not record.

    Args:
      run: the run.
      targets: accuracies to be reached.
      horizon: simulated time at which accuracies are told, what comes later is left out; the run's
        own end where None.
    """
    end = math.inf if run.summary is None else covered(run) if horizon is None else horizon
    rows = [row for row in run.evaluations if row["time"] <= end]

    def recorded(name):
        value = (run.summary or {}).get(name)
        return math.nan if value is None else float(value)

    columns: dict[str, Callable[[], float]] = {
        "final": lambda: rows[-1]["accuracy"],
        "best": lambda: max(row["accuracy"] for row in rows),
        "last ten": lambda: last_mean(rows),
        "last quarter": lambda: last_quarter(rows, end),
        "area": lambda: area(rows, end),
        **{f"time to {t:g}": lambda t=t: time_to(rows, t) for t in targets},
        "versions": lambda: recorded("versions"),
        "staleness": lambda: recorded("staleness_mean"),
        "server ms": lambda: 1e3 * recorded("server_seconds_per_arrival"),
        "sent MB": lambda: recorded("bytes_sent") / 1e6,
        "seconds": lambda: recorded("wall_seconds"),
    }
    return {name: math.nan if run.summary is None else value() for name, value in columns.items()}


# --- over seeds -----------------------------------------------------------------------------------


class Spread(NamedTuple):
    """Mean and standard deviation (n - 1) over the seeds with a finite figure, and how many."""

    mean: float
    deviation: float
    seeds: int


def spread(values: Iterable[float]) -> Spread:
    """The spread of the finite values; NaN where there are none, and of fewer than two."""
    finite = [value for value in values if math.isfinite(value)]
    mean = statistics.fmean(finite) if finite else math.nan
    return Spread(mean, statistics.stdev(finite) if len(finite) > 1 else math.nan, len(finite))


class Difference(NamedTuple):
    """Mean of paired differences with its 95% interval, and the number of pairs."""

    mean: float
    low: float
    high: float
    pairs: int


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference:
    """The mean over common seeds of ours - theirs, and Student's 95% interval of that mean.

    mean +- t_{n-1} s / sqrt(n), with s the standard deviation of the n differences and t_{n-1} the
    97.5% quantile of Student's law. What a seed does to both cancels. A bootstrap of so few seeds
    would promise too much: of three it covers the mean in 75% of cases.

    Args:
      ours, theirs: a figure by seed; pairs with one that is not finite are left out.

    Returns:
      NaN where no pair is left; an interval of NaN where only one is.
    """
    pairs = [ours[s] - theirs[s] for s in sorted(ours.keys() & theirs.keys())]
    differences = np.asarray([d for d in pairs if math.isfinite(d)])
    if len(differences) == 0:
        return _UNKNOWN
    if len(differences) == 1:
        return Difference(float(differences[0]), math.nan, math.nan, 1)
    count, mean = len(differences), float(differences.mean())
    quantile = float(stats.t.ppf((1 + COVERAGE) / 2, count - 1))
    reach = quantile * float(differences.std(ddof=1)) / math.sqrt(count)
    return Difference(mean, mean - reach, mean + reach, count)


_UNKNOWN = Difference(math.nan, math.nan, math.nan, 0)


class Row(NamedTuple):
    """A line of the table.

    Attributes:
      label: what is compared.
      seeds: number of runs.
      failed: number of those that failed.
      spreads: by column.
      differences: by column, to the first line; empty in the first line, and where not paired.
      paired: whether a seed gives the same world here and in the first line.
    """

    label: str
    seeds: int
    failed: int
    spreads: dict[str, Spread]
    differences: dict[str, Difference]
    paired: bool = True


def _world(run: Run) -> tuple[Any, ...]:
    """What its seed means."""
    config = run.config
    return tuple(getattr(config, name) for name in WORLD_FIELDS)


def horizons(runs: Iterable[Run]) -> dict[tuple[Any, ...], float]:
    """By world, the simulated time that all of its runs cover: a shorter world, as of a higher
    concurrency at as many arrivals, does not cut the others."""
    worlds: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        worlds.setdefault(_world(run), []).append(run)
    return {world: common_end(own) for world, own in worlds.items()}


def table(groups: Mapping[str, Sequence[Run]], targets: Sequence[float] = ()) -> list[Row]:
    """A line for each group; accuracies are told at the end of the shortest run of a world."""
    ends = horizons(run for own in groups.values() for run in own)
    rows, first = [], None
    reference = {_world(run) for run in next(iter(groups.values()))}
    for label, own in groups.items():
        by_seed = {run.config.seed: figures(run, targets, ends[_world(run)]) for run in own}
        names = list(next(iter(by_seed.values())))
        columns = {name: {seed: f[name] for seed, f in by_seed.items()} for name in names}
        differences, paired = {}, len(reference | {_world(run) for run in own}) == 1
        if first is not None and paired:
            differences = {n: paired_difference(columns[n], first[n]) for n in names}
        first = columns if first is None else first
        rows.append(
            Row(
                label,
                len(own),
                sum(run.summary is None for run in own),
                {name: spread(values.values()) for name, values in columns.items()},
                differences,
                paired,
            )
        )
    return rows


DIGITS = {"versions": 0, "staleness": 1, "server ms": 1, "sent MB": 1, "seconds": 0}
# Columns whose difference to the first line is shown beside them; table.csv has all.
SHOWN_DIFFERENCES = ("final", "last ten", "last quarter")


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table as texts, the header first."""
    columns = list(rows[0].spreads)
    header = ["", "seeds"]
    for name in columns:
        header.append(name)
        if name in SHOWN_DIFFERENCES and len(rows) > 1:
            header.append(f"{name} − {rows[0].label}")
    lines = [header]
    for row in rows:
        line = [row.label, f"{row.seeds}" + (f", {row.failed} failed" if row.failed else "")]
        for name in columns:
            line.append(_shown_spread(name, row))
            if name in SHOWN_DIFFERENCES and len(rows) > 1:
                difference = _shown_difference(row.differences.get(name), row.seeds)
                line.append(difference if row.paired else "not paired")
        lines.append(line)
    return lines


def _shown_spread(name: str, row: Row) -> str:
    value = row.spreads[name]
    if not value.seeds:
        return "never" if name.startswith("time to") and row.failed < row.seeds else "–"
    digits = DIGITS.get(name, 1 if name.startswith("time to") else 3)
    text = f"{value.mean:.{digits}f}"
    if math.isfinite(value.deviation):
        text += f" ± {value.deviation:.{digits}f}"
    if value.seeds < row.seeds:
        text += f" ({value.seeds} of {row.seeds})"
    return text


def _shown_difference(value: Difference | None, seeds: int) -> str:
    if value is None or not value.pairs:
        return "–"
    # Rounded first: there is no use in a sign before 0.000.
    mean, low, high = (f"{round(number, 3) + 0.0:+.3f}" for number in value[:3])
    text = f"{mean} [{low}, {high}]" if math.isfinite(value.low) else mean
    return text + (f" ({value.pairs} of {seeds})" if value.pairs < seeds else "")


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table of texts as Markdown, the first line being its header."""
    escaped = ([text.replace("|", "\\|") for text in line] for line in lines)
    header, *body = ("| " + " | ".join(line) + " |" for line in escaped)
    return "\n".join([header, "|" + "---|" * len(lines[0]), *body]) + "\n"


def as_csv(rows: Sequence[Row]) -> str:
    """All figures, empty where not known; `difference`, its `low` and `high` and the number of
    `pairs` behind it are to the first line."""
    names = list(rows[0].spreads)
    parts = ("mean", "std", "count", "difference", "low", "high", "pairs")
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["label", "seeds", "failed", *(f"{n} {p}" for n in names for p in parts)])
    for row in rows:
        values = [v for n in names for v in (*row.spreads[n], *row.differences.get(n, _UNKNOWN))]
        shown = ["" if isinstance(v, float) and not math.isfinite(v) else v for v in values]
        writer.writerow([row.label, row.seeds, row.failed, *shown])
    return stream.getvalue()
