"""The runs of a comparison: which configurations, and running what is not done, several at once.

Every method of a comparison gets the same seeds, and with them the same population, shards and
delays.
"""

import concurrent.futures
import concurrent.futures.process
import dataclasses
import logging
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedrevive_jax import data
from fedrevive_jax.comparison import statistics, tuning
from fedrevive_jax.comparison.statistics import Run
from fedrevive_jax.comparison.tuning import Choice
from fedrevive_jax.compute import environment
from fedrevive_jax.config import DEVICE_FIELDS, LOCATION_FIELDS, Config
from fedrevive_jax.errors import ConfigError, UserError
from fedrevive_jax.presets import resolve
from fedrevive_jax.record import files
from fedrevive_jax.record.interruption import InterruptedRunError, Interruption
from fedrevive_jax.running import runner
from fedrevive_jax.server import client_cache
from fedrevive_jax.simulation import planning

# Marks a run that diverged or whose uploads were rejected, which would only end so again.
FAILED = "failed.json"
# Evaluations of a run of a comparison, at the same simulated times for all methods: the best of
# many evaluations is better, and what is looked at more often is found earlier.
EVALUATIONS = 50
# Tuning takes seeds this far from those of the comparison.
TUNING_SEEDS = 1000
# Seconds between two looks at whether several processes shall stop.
LOOK_EVERY = 0.2

Notify = Callable[[str], Any]


class LostWorkerError(UserError):
    """A process that ran a part of the comparison is gone."""


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


def run_all(
    configs: Sequence[Config],
    jobs: int = 1,
    overwrite: bool = False,
    notify: Notify = print,
    interruption: Interruption | None = None,
) -> list[Run]:
    """Runs what is not done, continues what was interrupted, and reads what all have recorded.

    A run that diverges or reaches its limit of rejected uploads is marked in its folder and counts
    as done.

    Args:
      configs: what to run, each with a folder of its own.
      jobs: processes at once; with 1 the runs share this process, one after the other.
      overwrite: run again what is done.
      notify: told a line for every run.
      interruption: asks the runs to save and stop.

    Raises:
      ConfigError: a folder holds another run, a memory of all clients cannot fit, the data are
        not what a run needs, or several processes would share an accelerator.
      InterruptedRunError: the runs were asked to stop, and have saved.
    """
    environment.check()
    if jobs > 1 and jax.default_backend() != "cpu":
        raise ConfigError("jobs", jobs, "must be 1 on an accelerator, which one process holds")
    # Folders and memories are checked before the first run, so that a wrong one is told at once.
    digest_of = _once_each()
    waiting = [config for config in configs if overwrite or not _is_done(config, digest_of)]
    _check_caches(waiting, jobs)
    if jobs == 1:
        for config in waiting:
            _run(config, overwrite, interruption)
            notify(_line(config))
    else:
        _run_side_by_side(waiting, jobs, overwrite, notify, interruption)
    return [
        statistics.read_run(config.run_dir, (config.run_dir / FAILED).exists())
        for config in configs
    ]


def read_all(folders: Sequence[tuple[str, Path]]) -> list[Run]:
    """Runs that exist already: what each is called, empty for its method's name, and its folder."""
    return [
        statistics.read_run(folder, (folder / FAILED).exists())._replace(label=label)
        for label, folder in folders
    ]


def _run_side_by_side(
    configs: Sequence[Config],
    jobs: int,
    overwrite: bool,
    notify: Notify,
    interruption: Interruption | None,
) -> None:
    grace = None if interruption is None else interruption.grace
    # Fresh interpreters: a forked JAX may hang.
    pool = concurrent.futures.ProcessPoolExecutor(
        jobs,
        multiprocessing.get_context("spawn"),
        initializer=_become_worker,
        initargs=(grace,),
    )
    with pool:
        waiting = {pool.submit(_run_in_worker, config, overwrite): config for config in configs}
        try:
            while waiting:
                done, _ = concurrent.futures.wait(
                    waiting, LOOK_EVERY, concurrent.futures.FIRST_COMPLETED
                )
                for future in done:
                    config = waiting.pop(future)
                    try:
                        future.result()
                    except concurrent.futures.process.BrokenProcessPool:
                        raise LostWorkerError(
                            "a process of `jobs` has died, killed or out of memory; the same "
                            "command continues"
                        ) from None
                    notify(_line(config))
                if waiting and interruption is not None and interruption.requested:
                    raise InterruptedRunError(
                        f"interrupted: {len(configs) - len(waiting)} of {len(configs)} runs are "
                        "done, those under way are told to save"
                    )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def _become_worker(grace: float | None) -> None:
    """Leaves Ctrl-C, which a terminal sends to all, to the process that started this one, and
    watches for its SIGTERM from now on: a worker that died of one between two runs would take the
    others with it.

    Progress bars of several processes would overwrite each other, so that only warnings reach the
    error stream; errors come as exceptions.
    """
    global _watch, _warnings
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if grace is not None:
        _watch = Interruption(grace, (signal.SIGTERM,)).__enter__()
    _warnings = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("fedrevive_jax")
    logger.addHandler(_warnings)
    logger.propagate = False  # libraries may have given the root a handler of their own
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - as long as the process


# Of a worker, as long as the process.
_watch: Interruption | None = None
_warnings: logging.Handler = logging.NullHandler()


def _run_in_worker(config: Config, overwrite: bool) -> None:
    _warnings.setFormatter(logging.Formatter(f"warning: {config.run_dir.name}: %(message)s"))
    _run(config, overwrite, _watch)


def _run(config: Config, overwrite: bool, interruption: Interruption | None = None) -> None:
    try:
        runner.run(config, keep_record=True, overwrite=overwrite, interruption=interruption)
    except (runner.DivergenceError, runner.RejectLimitError) as error:
        ended = {"by": type(error).__name__, "message": str(error)}
        files.write_json(config.run_dir / FAILED, ended)


def _check_caches(configs: Sequence[Config], jobs: int) -> None:
    """Whether what the methods keep of every client fits, of the largest runs that may meet, see
    `client_cache.check_fit`.

    Raises:
      ConfigError: it does not.
    """
    # Seeds, rates and folders change no size.
    same = {"seed": 0, "server_lr": 1.0, "client_lr": 1.0, "workdir": ""}
    sizes: dict[Config, int] = {}
    places: dict[tuple[str, str], list[tuple[int, Config]]] = {}
    for config in configs:
        alike = dataclasses.replace(config, **same)
        if alike not in sizes:
            sizes[alike] = planning.cache_bytes(alike)
        if sizes[alike]:
            place = (config.cache_memory, config.cache_dir)
            places.setdefault(place, []).append((sizes[alike], config))
    for found in places.values():
        found.sort(key=lambda item: -item[0])
        needed, config = found[0]
        client_cache.check_fit(config, needed)
        together = found[:jobs]
        try:
            client_cache.check_fit(config, sum(size for size, _ in together))
        except ConfigError as error:
            raise ConfigError("jobs", jobs, f"too many at once. {error}") from None


def _once_each() -> Callable[[Config], str]:
    """`data.digest`, which is the same for every seed, and so reads each data set once."""
    known: dict[tuple[str, str], str] = {}

    def digest_of(config: Config) -> str:
        place = config.dataset, config.data_dir
        if place not in known:
            known[place] = data.digest(config)
        return known[place]

    return digest_of


def _is_done(config: Config, digest_of: Callable[[Config], str] = data.digest) -> bool:
    if runner.is_finished(config, digest_of=digest_of):
        return True
    failed = (config.run_dir / FAILED).exists()
    if failed:
        runner.check_sources(config, digest_of)
    return failed


def _line(config: Config) -> str:
    folder = config.run_dir
    if (folder / FAILED).exists():
        return f"{folder.name}: {files.read_json(folder / FAILED)['message']}"
    accuracy = files.read_json(folder / files.SUMMARY)["final_accuracy"]
    return f"{folder.name}: accuracy {accuracy:.4f}"


def _refuse(given: dict[str, Any], name: str, by: str) -> None:
    if given.get(name) is not None:
        raise ConfigError(name, given[name], f"is chosen {by} here")
