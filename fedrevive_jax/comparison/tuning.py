"""The choice of settings: every method tries the same number of points, and keeps the best.

A method's settings are searched one after the other. All values of the first are tried, the others
as the preset has them; the best stays, and the next is tried. A number whose best value is the
lowest or highest is tried further on, in the same ratio, until a better one lies no longer beyond.
When a whole round tries nothing new, the values around the best are halved in ratio. So a method
with few settings looks closer at them, and none gets more runs than another.

Pure functions; `campaign` runs the points.
"""

import dataclasses
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

from fedrevive_jax.config import LOCATION_FIELDS, Config, Dfkd, FedGen, Server
from fedrevive_jax.errors import ConfigError

# A value of every searched field, in their order.
Point = tuple[Any, ...]

# The next step along an axis of a single value.
RATIO = 3.0
# What a method may choose for itself. A search over anything else would choose an easier world.
SEARCHED = {field.name for part in (Server, FedGen, Dfkd) for field in dataclasses.fields(part)} | {
    "buffer_size", "client_lr", "local_iterations", "batch_size",
}  # fmt: skip
SEARCHED -= {"method", *LOCATION_FIELDS}


class Axis(NamedTuple):
    """The values of a field to be tried.

    Attributes:
      field: its name.
      values: numbers in rising order, or texts as they were given.
      numeric: whether there are values between and beyond them.
    """

    field: str
    values: tuple[Any, ...]
    numeric: bool


class Choice(NamedTuple):
    """What tuning chose for a method.

    Attributes:
      fields: what was searched.
      point: the best point; of equals the one that was tried first.
      scores: mean over tuning seeds of the last quarter, by point in the order of the search; -inf
        where a run failed.
      edges: fields of which the best value is still the lowest or highest that was tried.
    """

    fields: tuple[str, ...]
    point: Point
    scores: dict[Point, float]
    edges: tuple[str, ...]

    @property
    def settings(self) -> dict[str, Any]:
        return dict(zip(self.fields, self.point, strict=True))


def axes(texts: Sequence[str], config: Config) -> list[Axis]:
    """The axes of a method from texts FIELD=v1,v2,...; fields that it does not read are left out.

    A value like x3 is a factor of the method's preset: the same factors for methods whose rates
    mean different things. Another value is the value itself. What the preset has is always tried.

    Raises:
      ConfigError: a field is not to be searched, comes twice, or a value is not one of it.
    """
    fields = {field.name: field for field in dataclasses.fields(Config)}
    found: dict[str, Axis] = {}
    for text in texts:
        name, _, values = text.partition("=")
        if name not in SEARCHED or not values:
            raise ConfigError(
                "tune_grid", text, "must be FIELD=v1,v2,... of a setting that methods may choose"
            )
        if name in found:
            raise ConfigError("tune_grid", text, "must not name a field twice")
        preset, kind = getattr(config, name), fields[name].type
        own = [preset]
        for value in values.split(","):
            try:
                own.append(
                    value if kind is str else _number(value, preset, kind)  # type: ignore[arg-type]
                )
            except (ValueError, OverflowError):
                raise ConfigError(
                    "tune_grid", text, "must be numbers, or factors of the preset like x3"
                ) from None
            dataclasses.replace(config, **{name: own[-1]})  # whether the field allows it
        own = list(dict.fromkeys(own))
        found[name] = Axis(name, tuple(own if kind is str else sorted(own)), kind is not str)
    return [axis for axis in found.values() if reads(config, axis.field)]


def _number(text: str, preset: float, kind: Callable) -> float:
    return _rounded(float(text.removeprefix("x")) * (preset if text.startswith("x") else 1), kind)


def _rounded(value: float, kind: Callable) -> Any:
    return round(value) if kind is int else float(f"{value:.6g}")


def reads(config: Config, field: str) -> bool:
    """Whether a method reads a field: only those that distil do so with the fields of `Dfkd`, and
    only they and AFL-DW blend by beta."""
    distils = config.traits.distils
    if field in {known.name for known in dataclasses.fields(Dfkd)}:
        return distils
    return distils or config.method == "afl_dw" or not field.startswith("beta_")


def search(
    own: Sequence[Axis], config: Config, runs: int, legal: Callable[[Point], bool]
) -> Generator[list[Point], Mapping[Point, float], Choice]:
    """Yields points to be tried, and is sent their scores, until `runs` points were tried.

    Args:
      own: the axes of the method.
      config: its preset, where the search begins.
      runs: points in all.
      legal: whether a configuration may have the values of a point.

    Returns:
      The choice.

    Raises:
      ConfigError: every point failed.
    """
    fields = tuple(axis.field for axis in own)
    values = [list(axis.values) for axis in own]
    scores: dict[Point, float] = {}
    best: Point = tuple(getattr(config, name) for name in fields)

    def attempt(points):
        new = [p for p in dict.fromkeys(points) if p not in scores and legal(p)]
        new = new[: runs - len(scores)]
        if new:
            answers = yield new
            scores.update((point, answers[point]) for point in new)
        return max(scores, key=lambda point: scores[point])  # of equals the first

    def moved(place: int, value: Any) -> Point:
        return (*best[:place], value, *best[place + 1 :])

    best = yield from attempt([best])
    before = 0
    while before < len(scores) < runs:
        before = len(scores)
        for place, axis in enumerate(own):
            best = yield from attempt(moved(place, value) for value in values[place])
            while axis.numeric:
                beyond = _beyond(values[place], best[place])
                if beyond is None or len(scores) >= runs or not legal(moved(place, beyond)):
                    break
                values[place] = sorted([*values[place], beyond])
                best = yield from attempt([moved(place, beyond)])
        if len(scores) == before:
            for place, axis in enumerate(own):
                if axis.numeric:
                    values[place] = _refined(values[place], best[place])
            points = [moved(place, value) for place in range(len(own)) for value in values[place]]
            best = yield from attempt(points)
    if scores[best] == -math.inf:
        raise ConfigError(
            "tune", None, f"every run of the search of {config.method} failed; try smaller rates"
        )
    edges = tuple(
        name
        for name, value, tried, axis in zip(fields, best, values, own, strict=True)
        if axis.numeric and len(tried) > 1 and value in (tried[0], tried[-1])
    )
    return Choice(fields, best, scores, edges)


def _beyond(values: Sequence[Any], best: Any) -> Any:
    """The next value beyond the end at which the best lies; None where it lies at none."""
    kind = type(best)
    if len(values) == 1:
        return _rounded(values[0] * RATIO, kind) if values[0] > 0 else None
    if best == values[-1]:
        near, far = values[-2], values[-1]
    elif best == values[0]:
        near, far = values[1], values[0]
    else:
        return None
    if not (near > 0 and far > 0):
        return None
    beyond = _rounded(far * far / near, kind)
    return None if beyond in values or not beyond else beyond


def _refined(values: Sequence[Any], best: Any) -> list[Any]:
    """The values, and the geometric means of the best and its neighbours."""
    place, kind = values.index(best), type(best)
    around = [values[i] for i in (place - 1, place + 1) if 0 <= i < len(values)]
    means = [_rounded(math.sqrt(best * other), kind) for other in around if best * other > 0]
    return sorted({*values, *means})


def cells(choices: Mapping[str, Choice]) -> list[list[str]]:
    """The chosen values as texts; a star marks one on the edge of what was tried. All scores follow
    in the order of the search."""
    fields = list(dict.fromkeys(name for choice in choices.values() for name in choice.fields))
    lines = [["method", *fields, "validation, last quarter", "equal", "all scores"]]
    for method, choice in choices.items():
        settings = choice.settings
        chosen = [
            f"{told(settings[name])}{'*' if name in choice.edges else ''}"
            if name in settings
            else "–"
            for name in fields
        ]
        best = choice.scores[choice.point]
        equal = sum(score == best for score in choice.scores.values())
        scores = (
            f"{', '.join(map(told, point))}: "
            + (f"{score:.3f}" if math.isfinite(score) else "failed")
            for point, score in choice.scores.items()
        )
        of = f"{equal} of {len(choice.scores)}"
        lines.append([method, *chosen, f"{best:.3f}", of, "; ".join(scores)])
    return lines


def told(value: Any) -> str:
    """A value in a table or the name of a folder."""
    return value if isinstance(value, str) else f"{value:g}"
