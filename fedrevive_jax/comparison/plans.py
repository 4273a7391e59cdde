"""Which configurations a comparison runs: of methods, of an ablation, of a search.

Every method of a comparison gets the same seeds, and with them the same population, shards and
delays.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedrevive_jax.comparison import statistics, tuning
from fedrevive_jax.comparison.statistics import Run
from fedrevive_jax.comparison.tuning import Choice
from fedrevive_jax.config import DEVICE_FIELDS, LOCATION_FIELDS, Config
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.presets import resolve
from fedrevive_jax.running import runner

# Evaluations of a run of a comparison, at the same simulated times for all methods: the best of
# many evaluations is better, and what is looked at more often is found earlier.
EVALUATIONS = 50
# Tuning takes seeds this far from those of the comparison.
TUNING_SEEDS = 1000


def of_methods(
    given: dict[str, Any],
    methods: Sequence[str],
    seeds: int,
    out: Path,
    chosen: dict[str, Choice] | None = None,
) -> list[Config]:
    """A configuration for each method and seed, by method; at the chosen rates if there are any.

    Args:
      given: what the user says of fields and of the preset.
      methods: to compare.
      seeds: how many, counted up from the given or the preset's.
      out: folder for the runs' folders.
      chosen: what tuning chose, by method.
    """
    _refuse(given, "method", "by `methods`")
    _refuse(given, "workdir", "by `out`")
    first = resolve(**given).seed
    configs = []
    for method in methods:
        fields, word = {**given, "method": method}, ""
        if chosen is not None:
            settings = chosen[method].settings
            fields |= settings
            # Another search may choose other values: those are other runs.
            word = "_tuned" + _worded(settings)
        for seed in range(first, first + seeds):
            place = str(out / f"{method}{word}_seed{seed}")
            configs.append(_resolved(**{**fields, "seed": seed, "workdir": place}))
    return configs


def _resolved(**given: Any) -> Config:
    """The configuration of a run of a comparison; evaluations are told by simulated time, if the
    user does not say otherwise."""
    config = resolve(**given)
    if {"eval_every", "eval_interval"} & {name for name in given if given[name] is not None}:
        return config
    return dataclasses.replace(config, eval_interval=config.max_time / EVALUATIONS)


def of_ablation(
    given: dict[str, Any], ablations: Sequence[str], seeds: int, out: Path
) -> tuple[list[str], list[Config]]:
    """The ablated fields, and a configuration for each of their values and seeds.

    Args:
      given: what the user says of other fields and of the preset.
      ablations: texts FIELD=v1,v2,... Of one, all values are compared. Of several, each changes
        one field of the same reference, which comes first and is what the user and the preset say.
      seeds: how many, counted up from the given or the preset's.
      out: folder for the runs' folders.
    """
    _refuse(given, "workdir", "by `out`")
    together = len(ablations) > 1
    swept: dict[str, list[str]] = {}
    for ablation in ablations:
        field, values = _ablated(ablation, at_least=1 if together else 2)
        _refuse(given, field, "by `ablate`")
        if field in swept:
            raise ConfigError("ablate", ablation, "must not name a field twice")
        swept[field] = values

    def settled(field, **fields):  # auto may stand for another value of the list
        return getattr(runner.settle(resolve(**{**given, **fields})), field)

    reference = resolve(**given)
    changes: dict[str, dict[str, str]] = {"": {}} if together else {}
    for field, values in swept.items():
        told = [settled(field, **{field: value}) for value in values]
        if len(set(told)) < len(told):
            raise ConfigError(
                "ablate", f"{field}={','.join(values)}", "must not hold a value twice"
            )
        for value, meant in zip(values, told, strict=True):
            if together and meant == settled(field):
                continue
            word = f"_{field}={value.replace('/', '_')}"
            if word in changes:
                raise ConfigError(
                    "ablate", f"{field}={','.join(values)}", f"{word[1:]} would name two folders"
                )
            changes[word] = {field: value}
    configs = []
    for word, change in changes.items():
        for seed in range(reference.seed, reference.seed + seeds):
            place = str(out / f"{reference.method}{word}_seed{seed}")
            configs.append(_resolved(**{**given, **change, "seed": seed, "workdir": place}))
    return list(swept), configs


def _ablated(text: str, at_least: int) -> tuple[str, list[str]]:
    """The field and the values of FIELD=v1,v2,..."""
    field, _, values = text.partition("=")
    parts = values.split(",") if values else []
    if field in ("seed", "method", "workdir") or len(set(parts)) < at_least:
        count = "two or more values" if at_least > 1 else "values"
        raise ConfigError(
            "ablate",
            text,
            f"must be FIELD=v1,v2,... with {count} of a field other than method and seed",
        )
    known = {known.name for known in dataclasses.fields(Config)}
    if field not in known - {*LOCATION_FIELDS, *DEVICE_FIELDS}:
        raise ConfigError(
            "ablate",
            text,
            f"{field} must be a setting of the run, not a place, a device or a preset",
        )
    return field, parts


def tune(
    given: dict[str, Any],
    methods: Sequence[str],
    grid: Sequence[str],
    *,
    runs: int,
    max_time: str | None,
    seeds: int,
    out: Path,
    run: Callable[[list[Config]], list[Run]],
) -> dict[str, Choice]:
    """What is best for each method: `runs` points of each are tried, on the validation split.

    Args:
      given, methods: see `of_methods`.
      grid: see `tuning.axes`.
      runs: points of each method.
      max_time: simulated time of each run; as long as the comparison's where None.
      seeds: how many at each point, none of them a seed of the comparison.
      out: folder of the comparison.
      run: runs configurations and reads what they recorded; it is given what all methods wait for,
        so that several processes have something to do.
    """
    _refuse(given, "eval_split", "by `tune`")
    fields = {**given, "eval_split": "validation"}
    if max_time is not None:
        fields["max_time"] = max_time
    first = resolve(**given).seed + TUNING_SEEDS
    searches, wanted = {}, {}
    for method in methods:
        start = resolve(**{**fields, "method": method})
        own = tuning.axes(grid, start)
        for axis in own:
            _refuse(given, axis.field, "by `tune`")
        names = [axis.field for axis in own]

        def configured(point, seed, method=method, names=names):
            settings = dict(zip(names, point, strict=True))
            config = _resolved(**{**fields, "method": method, "seed": seed, **settings})
            name = f"{method}{_worded(settings)}_time{config.max_time:g}_seed{seed}"
            return dataclasses.replace(config, workdir=str(out / "tune" / name))

        def legal(point, configured=configured):
            try:
                configured(point, first)
            except ConfigError:
                return False
            return True

        search = tuning.search(own, start, runs, legal)
        searches[method] = search, configured
        wanted[method] = next(search)
    chosen = {}
    while wanted:
        configs = {
            (method, point): [searches[method][1](point, first + i) for i in range(seeds)]
            for method, points in wanted.items()
            for point in points
        }
        found = iter(run([config for group in configs.values() for config in group]))
        scores: dict[str, dict[tuning.Point, float]] = {}
        for (method, point), group in configs.items():
            scores.setdefault(method, {})[point] = score([next(found) for _ in group])
        for method in list(wanted):
            try:
                wanted[method] = searches[method][0].send(scores[method])
            except StopIteration as end:
                chosen[method] = end.value
                del wanted[method]
    return {method: chosen[method] for method in methods}


def score(runs: Sequence[Run]) -> float:
    """Mean accuracy of the last quarter of the planned time; -inf where a run failed."""
    if not all(run.summary for run in runs):
        return -math.inf
    values = [statistics.last_quarter(run.evaluations, run.config.max_time) for run in runs]
    return float(np.mean(values))


def _worded(settings: Mapping[str, Any]) -> str:
    """Settings in the name of a folder."""
    return "".join(
        f"_{name}={tuning.told(value).replace('/', '_')}" for name, value in settings.items()
    )


def _refuse(given: dict[str, Any], name: str, by: str) -> None:
    if given.get(name) is not None:
        raise ConfigError(name, given[name], f"is chosen {by} here")
