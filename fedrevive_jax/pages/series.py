"""What the charts of a page show, as numbers: rows of a record, thinned out where there are many.

Nothing is left out in silence: whatever is thinned says by how much.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Row = dict[str, Any]

# A browser draws so many at once without a pause.
MOST_POINTS = 2000
MOST_BINS = 400
MOST_CLIENTS = 60
MOST_JOBS = 3000
MOST_CELLS = 8000


def column(rows: Sequence[Row], name: str) -> np.ndarray:
    """A field of all rows, float64 [rows]; NaN where it is null or missing."""
    values = [row.get(name) for row in rows]
    return np.asarray([np.nan if value is None else value for value in values], np.float64)


class Binned(NamedTuple):
    """Values in their order, each alone or several together.

    Attributes:
      x, y: float64 [bins], means of a bin.
      low, high: float64 [bins], its 10% and 90% quantiles.
      per: values in a bin; 1: every value is there, and the four agree.
    """

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray
    per: int


def binned(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS, bins: int = MOST_BINS) -> Binned:
    """Values [n] at x [n], those that are finite; more than `most` of them in about `bins` bins of
    equally many neighbours, the last of fewer."""
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= most:
        return Binned(x, y, y, y, 1)
    per = -(-len(x) // bins)
    starts = range(0, len(x), per)
    parts = [y[at : at + per] for at in starts]
    low, high = np.asarray([np.quantile(part, [0.1, 0.9]) for part in parts]).T
    places = np.asarray([x[at : at + per].mean() for at in starts])
    return Binned(places, np.asarray([part.mean() for part in parts]), low, high, per)


def spaced(count: int, most: int) -> np.ndarray:
    """Places among `count`, at most `most` of them: evenly spaced, the first and the last too."""
    if count <= most:
        return np.arange(count)
    return np.unique(np.linspace(0, count - 1, most).round().astype(int))


class Timeline(NamedTuple):
    """Jobs that arrived, by client.

    Attributes:
      clients: numbers of the clients that are shown, ascending.
      jobs: rows of their jobs.
      all_clients, all_jobs: how many there are to choose from.
    """

    clients: list[int]
    jobs: list[Row]
    all_clients: int
    all_jobs: int


def timeline(arrivals: Sequence[Row]) -> Timeline:
    """The jobs of clients that are evenly spaced among all that sent something, the newest of them
    where they are too many."""
    known = sorted({row["client"] for row in arrivals})
    clients = [known[place] for place in spaced(len(known), MOST_CLIENTS)]
    shown = set(clients)
    jobs = [row for row in arrivals if row["client"] in shown][-MOST_JOBS:]
    return Timeline(clients, jobs, len(known), len(arrivals))


class PoolCounts(NamedTuple):
    """The pool by class.

    Attributes:
      starts, ends: float64 [moments], from when until when a count is the newest that is known; the
        last one, which may come at the very end, is given as long as the one before it.
      counts: int [moments, classes].
      all_moments: how many are recorded.
    """

    starts: np.ndarray
    ends: np.ndarray
    counts: np.ndarray
    all_moments: int


def pool(rows: Sequence[Row], end: float) -> PoolCounts | None:
    """The pool at evenly spaced moments until `end`; None where nothing was ever in it."""
    if not rows or not any(map(any, (row["counts"] for row in rows))):
        return None
    places = spaced(len(rows), max(2, MOST_CELLS // len(rows[0]["counts"])))
    chosen = [rows[place] for place in places]
    starts = column(chosen, "time")
    ends = np.append(starts[1:], max(end, starts[-1] + np.diff(starts, prepend=0.0)[-1]))
    return PoolCounts(starts, ends, np.asarray([row["counts"] for row in chosen]), len(rows))


def rejections(arrivals: Sequence[Row]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By reason, when uploads were rejected and how many until then; the most frequent first."""
    times: dict[str, list[float]] = {}
    for row in arrivals:
        if row.get("rejected") is not None:
            times.setdefault(str(row["rejected"]), []).append(row["time"])
    found = {}
    for reason, own in sorted(times.items(), key=lambda item: -len(item[1])):
        places = spaced(len(own), MOST_BINS)
        found[reason] = np.asarray(own)[places], places + 1
    return found


class Client(NamedTuple):
    """What one client sent: arrivals, their mean staleness and loss, and the rejected ones."""

    number: int
    arrivals: int
    staleness: float
    loss: float
    rejected: int


def clients(arrivals: Sequence[Row]) -> list[Client]:
    """A line for each client that sent something, the busiest first."""
    own: dict[int, list[Row]] = {}
    for row in arrivals:
        own.setdefault(row["client"], []).append(row)
    lines = []
    for number, rows in own.items():
        losses = column(rows, "loss")
        finite = losses[np.isfinite(losses)]
        loss = float(finite.mean()) if len(finite) else np.nan
        rejected = sum(row.get("rejected") is not None for row in rows)
        staleness = float(column(rows, "staleness").mean())
        lines.append(Client(number, len(rows), staleness, loss, rejected))
    return sorted(lines, key=lambda line: (-line.arrivals, line.number))


def cumulative(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values, ascending, and the share of all that are at most so large; at most
    `MOST_BINS` of them."""
    at, counts = np.unique(values, return_counts=True)
    places = spaced(len(at), MOST_BINS)
    return at[places], (np.cumsum(counts) / max(len(values), 1))[places]
