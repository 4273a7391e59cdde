"""Compares methods over seeds: python -m experiments.compare --methods=a,b --seeds=3 --out=DIR.

Any setting of a run that `experiments.main` takes is passed on to every run. What is finished is
read, not run again; what was interrupted continues. The same seed gives every method the same
population, shards and delays. Writes table.md, table.csv, curves.png, staleness.png, command.txt
and report.html into DIR, beside a folder for each run; with --ablate also ablation.png, and
by_staleness.png where runs of a method differ in --concurrency.

SIGTERM or SIGINT save the runs under way; the same command goes on from there (with --overwrite it
starts afresh). --jobs runs several at once on this machine, --scheduler on the workers of a
scheduler of Dask.

With --tune every method first tries the same number of settings, scored on the validation split;
with --ablate one method is compared with itself; with --workdirs runs are read that exist already.
"""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags
from etils import epath

from experiments import flags as config_flags
from fedrevive_jax.compute import buckets
from fedrevive_jax.config import METHODS, PUBLISHED_METHODS, is_bucket, whole_path
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.record.interruption import InterruptedRunError, Interruption

if TYPE_CHECKING:
    from fedrevive_jax.comparison import campaign

METHOD_LIST = flags.DEFINE_string(
    "methods",
    # FedBuff first: a synchronous method may have another concurrency, and is not paired then.
    ",".join(sorted(PUBLISHED_METHODS, key=lambda name: name != "fedbuff")),
    "methods, separated by commas, or all; differences are to the first",
)
SEEDS = flags.DEFINE_integer("seeds", 3, "number of seeds, counted up from --seed")
OUT = flags.DEFINE_string(
    "out", None, "folder for the runs and the tables; may be in a bucket, gs://BUCKET/DIR"
)
JOBS = flags.DEFINE_integer("jobs", 1, "runs at once, each in a process; on an accelerator 1")
SCHEDULER = flags.DEFINE_string(
    "scheduler",
    None,
    "tcp://HOST:PORT or tls://HOST:PORT of a scheduler of Dask, whose workers run one run at a "
    "time each",
)
SEND_BACK = flags.DEFINE_bool(
    "send_back",
    False,
    "with --scheduler: workers do not see --out; they work in folders of their own and send them "
    "back",
)
TARGETS = flags.DEFINE_string("targets", "0.5,0.8", "accuracies to be reached, for the table")
WORKDIRS = flags.DEFINE_string(
    "workdirs",
    None,
    "compare these folders of runs, separated by commas, * allowed (in a bucket in the last name "
    "alone); runs nothing. LABEL=FOLDERS calls them by another name than their method's",
)
TUNE = flags.DEFINE_bool(
    "tune", False, "choose settings of every method on the validation split, see --tune_grid"
)
TUNE_GRID = flags.DEFINE_multi_string(
    "tune_grid",
    ["server_lr=x0.3,x3", "client_lr=x0.3,x3"],
    "FIELD=v1,v2,...: values of a setting to try beside the preset's, x3 is three times it; may be "
    "given more than once",
)
TUNE_RUNS = flags.DEFINE_integer("tune_runs", 9, "points that every method tries")
TUNE_TIME = flags.DEFINE_string(
    "tune_time", None, "simulated time of tuning runs. Default: max_time"
)
TUNE_SEEDS = flags.DEFINE_integer("tune_seeds", 1, "seeds at each point of the grid")
ABLATE = flags.DEFINE_multi_string(
    "ablate",
    None,
    "FIELD=v1,v2,...: compare values of a field, for --method; given more than once, each changes "
    "one field of the same reference",
)
GRACE = config_flags.define_grace()
OVERWRITE = flags.DEFINE_bool("overwrite", False, "run again what is finished")
config_flags.define()
flags.adopt_module_key_flags(config_flags)


def main() -> int:
    out, methods, targets = _checked()
    with Interruption(GRACE.value) as interruption:
        from fedrevive_jax.comparison import campaign  # which takes long: signals are heard by now

        elsewhere = SCHEDULER.value or ""
        try:
            with campaign.Workers(JOBS.value, elsewhere, out, SEND_BACK.value) as workers:
                _compare(out, methods, targets, workers, interruption)
        except InterruptedRunError as message:
            print(message, file=sys.stderr)
            # Where a worker alone was asked to stop there is no status of a signal.
            return interruption.status or 1
    return interruption.status


def _compare(
    out: Path,
    methods: list[str],
    targets: list[float],
    workers: "campaign.Workers",
    interruption: Interruption,
) -> None:
    given = config_flags.given_values()
    from fedrevive_jax.comparison import campaign, plans, report, statistics

    def run(configs):
        report.prepare(out)  # before the first run, not after the last
        return campaign.run_all(
            configs,
            workers,
            OVERWRITE.value,
            lambda line: print(line, flush=True),
            interruption,
        )

    choices, tuning, fields = None, "", ()
    if WORKDIRS.value is not None:
        runs = campaign.read_all(_folders(WORKDIRS.value))
    elif ABLATE.value is not None:
        fields, configs = plans.of_ablation(given, ABLATE.value, SEEDS.value, out)
        runs = run(configs)
    else:
        # All configurations are resolved before the first run, so that a wrong one is told at once.
        configs = plans.of_methods(given, methods, SEEDS.value, out)
        if TUNE.value:
            choices = plans.tune(
                given,
                methods,
                TUNE_GRID.value,
                runs=TUNE_RUNS.value,
                max_time=TUNE_TIME.value,
                seeds=TUNE_SEEDS.value,
                out=out,
                run=run,
            )
            tried = sorted({len(choice.scores) for choice in choices.values()})
            tuning = (
                f"Chosen on the validation split by the mean accuracy over the last quarter of the "
                f"simulated time, with seeds that are not those below: "
                f"{' to '.join(map(str, tried))} points of each method, begun with "
                f"{'; '.join(TUNE_GRID.value)}. A star marks the edge of what was tried: a better "
                "value may lie beyond."
            )
            configs = plans.of_methods(given, methods, SEEDS.value, out, choices)
        runs = run(configs)
    groups = statistics.grouped(runs)
    datasets = sorted({r.config.dataset for r in runs})
    count = max(map(len, groups.values()))
    title = f"{', '.join(datasets)}, {'one seed' if count == 1 else f'{count} seeds'}"
    command = shlex.join(["python", "-m", "experiments.compare", *sys.argv[1:]])
    study = report.Study(title, command, groups, targets, choices, tuning, fields)
    print(report.write(out, study), end="")


def _checked() -> tuple[Path, list[str], list[float]]:
    """The folder, the methods and the targets.

    Raises:
      ConfigError: a flag is not what it must be. Nothing has been written then.
    """
    if not OUT.value:
        raise ConfigError("out", "", "must name a folder")
    for flag in (SEEDS, JOBS, TUNE_SEEDS, TUNE_RUNS):
        if flag.value < 1:
            raise ConfigError(flag.name, flag.value, "must be at least 1")
    if SCHEDULER.value is not None and JOBS.present:
        raise ConfigError("jobs", JOBS.value, "must not be given with --scheduler")
    if SEND_BACK.value and SCHEDULER.value is None:
        raise ConfigError("send_back", True, "goes with --scheduler")
    modes = (("workdirs", WORKDIRS.value), ("tune", TUNE.value or None), ("ablate", ABLATE.value))
    chosen = [name for name, value in modes if value is not None]
    if len(chosen) > 1:
        raise ConfigError(chosen[1], None, f"must not be given with --{chosen[0]}")
    if chosen and chosen != ["tune"] and METHOD_LIST.present:
        raise ConfigError(
            "methods",
            METHOD_LIST.value,
            f"must not be given with --{chosen[0]}"
            + ("; an ablation is of --method" if chosen == ["ablate"] else ""),
        )
    if WORKDIRS.value is not None:
        fields = config_flags.given_values()
        runs_alone = {
            flag.name: flag.value for flag in (SEEDS, JOBS, SCHEDULER, OVERWRITE) if flag.present
        }
        for name, value in {**fields, **runs_alone}.items():
            if value is not None:
                raise ConfigError(
                    name, value, "must not be given with --workdirs, which runs nothing"
                )
    for flag in (TUNE_GRID, TUNE_RUNS, TUNE_TIME, TUNE_SEEDS):
        if flag.present and not TUNE.value:
            given = " ".join(flag.value) if isinstance(flag.value, list) else flag.value
            raise ConfigError(flag.name, given, "goes with --tune")
    try:
        time_is_right = TUNE_TIME.value is None or float(TUNE_TIME.value) > 0
    except ValueError:
        time_is_right = False
    if not time_is_right:
        raise ConfigError("tune_time", TUNE_TIME.value, "must be a number above 0")
    methods = METHODS
    if METHOD_LIST.value != "all":
        methods = [name.strip() for name in METHOD_LIST.value.split(",")]
    for name in methods:
        if name not in METHODS:
            raise ConfigError(
                "methods", METHOD_LIST.value, f"{name!r} must be one of {', '.join(METHODS)}"
            )
    if len(set(methods)) < len(methods):
        raise ConfigError("methods", METHOD_LIST.value, "holds a method twice")
    try:
        targets = [float(part) for part in TARGETS.value.split(",") if part]
    except ValueError:
        targets = [-1.0]
    if not all(0 < target <= 1 for target in targets):
        raise ConfigError("targets", TARGETS.value, "must be accuracies above 0 and at most 1")
    if SEND_BACK.value and is_bucket(OUT.value):
        raise ConfigError("send_back", True, "must not be given with a bucket, which all write")
    return _path("out", OUT.value), list(methods), targets


def _path(flag: str, text: str) -> Path:
    """A folder of this machine or of a bucket."""
    whole = whole_path(flag, text, bucket=True)
    return epath.Path(whole) if is_bucket(whole) else Path(whole)  # type: ignore[return-value]


def _folders(text: str) -> list[tuple[str, Path]]:
    """What each run is called, and its folder. A folder's name may hold an equals sign, too."""
    found = []
    for part in map(str.strip, text.split(",")):
        label, equals, rest = part.partition("=")
        if not part or (equals and not (label and rest)):
            raise ConfigError("workdirs", text, "holds an empty name")
        named = equals and is_bucket(rest)
        paths = [] if named else _matching(part)
        if paths or not equals:
            label, rest = "", part
        else:
            paths = _matching(rest)
        if not paths:
            raise ConfigError("workdirs", text, f"there is no {rest}")
        found += [(label, _path("workdirs", path)) for path in paths]
    return found


def _matching(pattern: str) -> list[str]:
    return buckets.matching(whole_path("workdirs", pattern, bucket=True), "workdirs")


if __name__ == "__main__":
    config_flags.run(main)
