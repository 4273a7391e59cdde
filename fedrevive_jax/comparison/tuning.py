"""The choice of rates: the grid that every method gets, and the point that did best.

Pure functions; `campaign` runs the grid.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fedrevive_jax.config import Config
from fedrevive_jax.errors import ConfigError


class Point(NamedTuple):
    """A point of the grid: server's and client's rate, and its place in it."""

    server_lr: float
    client_lr: float
    place: tuple[int, int]


def grid(text_server: str, text_client: str, config: Config) -> list[Point]:
    """The grid of a method.

    A value like x3 is a factor of the method's preset: the same grid of factors for methods whose
    rates mean different things. A plain number is the rate itself.

    Raises:
      ConfigError: a value is not a positive number, or comes twice.
    """

    def values(name, text):
        preset = getattr(config, name)
        found = []
        for part in text.split(","):
            try:
                value = float(part.removeprefix("x")) * (preset if part.startswith("x") else 1)
            except ValueError:
                value = math.nan
            if not 0 < value < math.inf:
                raise ConfigError(
                    f"tune_{name}",
                    text,
                    "must be positive numbers separated by commas, as rates "
                    "or as factors of the preset like x3",
                )
            found.append(float(f"{value:.6g}"))
        if len(set(found)) < len(found):
            raise ConfigError(f"tune_{name}", text, "holds a rate twice")
        return sorted(found)

    server, client = values("server_lr", text_server), values("client_lr", text_client)
    return [Point(s, c, (i, j)) for i, s in enumerate(server) for j, c in enumerate(client)]


class Choice(NamedTuple):
    """What tuning chose for a method.

    Attributes:
      point: the best point; of equals the one with the smallest rates.
      scores: mean over tuning seeds of the last quarter, by point; -inf where a run failed.
      edges: fields of which the best value is the lowest or highest that was tried.
    """

    point: Point
    scores: dict[Point, float]
    edges: tuple[str, ...]


def choose(method: str, scores: Mapping[Point, Sequence[float]]) -> Choice:
    """The point of the highest mean score; of equals the one with the smallest rates.

    A score that is not finite, of a run that failed, rules its point out.

    Raises:
      ConfigError: every point failed.
    """
    means = {
        point: statistics.fmean(values) if all(map(math.isfinite, values)) else -math.inf
        for point, values in scores.items()
    }
    best = max(sorted(means, key=lambda p: p.place), key=lambda point: means[point])
    if means[best] == -math.inf:
        raise ConfigError(
            "tune", None, f"a run of every point of the grid of {method} failed; give smaller rates"
        )
    edges = []
    for axis, name in enumerate(("server_lr", "client_lr")):
        places = {point.place[axis] for point in means}
        if len(places) > 1 and best.place[axis] in (min(places), max(places)):
            edges.append(name)
    return Choice(best, means, tuple(edges))


def cells(choices: Mapping[str, Choice]) -> list[list[str]]:
    """The chosen rates as texts; a star marks a value on the edge of the grid. All scores follow in
    the order of the rates."""
    lines = [
        ["method", "server_lr", "client_lr", "validation, last quarter", "equal", "all scores"]
    ]
    for method, choice in choices.items():
        rates = [
            f"{getattr(choice.point, name):g}" + ("*" if name in choice.edges else "")
            for name in ("server_lr", "client_lr")
        ]
        best = choice.scores[choice.point]
        equal = sum(score == best for score in choice.scores.values())
        scores = (
            f"{point.server_lr:g}, {point.client_lr:g}: "
            + (f"{score:.3f}" if math.isfinite(score) else "failed")
            for point, score in choice.scores.items()
        )
        of = f"{equal} of {len(choice.scores)}"
        lines.append([method, *rates, f"{best:.3f}", of, "; ".join(scores)])
    return lines
