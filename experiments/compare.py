"""Compares methods over seeds: python -m experiments.compare --methods=a,b --seeds=3 --out=DIR.

Any flag of `experiments.main` is passed on to every run. Runs that are finished are read, not run
again; interrupted ones continue. The same seed gives every method the same population, shards and
delays. Writes table.md, table.csv and curves.png into DIR, beside a folder for each
run.
"""

import csv
import io
import statistics
from pathlib import Path

from absl import flags

from experiments import flags as config_flags
from fedrevive_jax.config import METHODS, ConfigError
from fedrevive_jax.presets import resolve

METHOD_LIST = flags.DEFINE_string("methods", ",".join(METHODS), "methods, separated by commas")
SEEDS = flags.DEFINE_integer("seeds", 3, "number of seeds, counted up from --seed")
OUT = flags.DEFINE_string("out", None, "folder for the runs and the tables")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "run again what is finished")
config_flags.define()
flags.adopt_module_key_flags(config_flags)

# The accuracy of a single evaluation is noisy under asynchrony; the mean over the last quarter of
# the simulated time is steadier, and covers the same time for every method.
RECENT = 0.25


def main() -> None:
    from fedrevive_jax import plots, runner

    if not OUT.value:
        raise ConfigError("--out=: must name a folder")
    if SEEDS.value < 1:
        raise ConfigError(f"--seeds={SEEDS.value}: must be at least 1")
    out, given = Path(OUT.value), config_flags.given_values()
    for name in ("method", "workdir"):
        if given[name] is not None:
            raise ConfigError(f"--{name}={given[name]}: is chosen by --methods and --out here")
    first = resolve(**given).seed
    # All configurations are resolved before the first run, so that a wrong one is told at once.
    configs = {
        method: [
            resolve(
                **{
                    **given,
                    "method": method,
                    "seed": seed,
                    "workdir": str(out / f"{method}_seed{seed}"),
                }
            )
            for seed in range(first, first + SEEDS.value)
        ]
        for method in METHOD_LIST.value.split(",")
    }
    rows, curves = [], {}
    for method, own in configs.items():
        results = []
        for config in own:
            results.append(runner.run(config, keep_record=True, overwrite=OVERWRITE.value))
            accuracy = results[-1].summary["final_accuracy"]
            print(f"{method}, seed {config.seed}: accuracy {accuracy:.4f}", flush=True)
        rows.append(_row(method, results))
        curves[method] = [result.evaluations for result in results]
    (out / "table.csv").write_text(_csv(rows), encoding="utf-8")
    table = _markdown(rows)
    (out / "table.md").write_text(table, encoding="utf-8")
    dataset = next(iter(configs.values()))[0].dataset
    seeds = "one seed" if SEEDS.value == 1 else f"{SEEDS.value} seeds"
    plots.comparison(out / "curves.png", f"{dataset}, {seeds}", curves)
    print(table, end="")


def _row(method: str, results: list) -> dict[str, object]:
    """One line of the table: every figure as (mean, standard deviation over seeds)."""

    def over_seeds(values):
        values = list(values)
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0

    def recent(result):
        rows = result.evaluations
        since = (1 - RECENT) * rows[-1]["time"]
        return statistics.fmean(row["accuracy"] for row in rows if row["time"] >= since)

    return {
        "method": method,
        "seeds": len(results),
        "final": over_seeds(r.summary["final_accuracy"] for r in results),
        "last quarter": over_seeds(recent(r) for r in results),
        "best": over_seeds(r.summary["best_accuracy"] for r in results),
        "versions": over_seeds(r.summary["versions"] for r in results),
        "staleness": over_seeds(r.summary["staleness_mean"] for r in results),
        "seconds": over_seeds(r.summary["wall_seconds"] for r in results),
    }


def _markdown(rows: list[dict[str, object]]) -> str:
    digits = {"versions": 0, "staleness": 1, "seconds": 0}

    def shown(name, value, seeds):
        if not isinstance(value, tuple):
            return str(value)
        mean, deviation = (f"{number:.{digits.get(name, 3)}f}" for number in value)
        return f"{mean} ± {deviation}" if seeds > 1 else mean

    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    for row in rows:
        lines.append("| " + " | ".join(shown(*item, row["seeds"]) for item in row.items()) + " |")
    return "\n".join(lines) + "\n"


def _csv(rows: list[dict[str, object]]) -> str:
    stream = io.StringIO()
    names = [
        f"{name} {part}" if isinstance(value, tuple) else name
        for name, value in rows[0].items()
        for part in (("mean", "std") if isinstance(value, tuple) else ("",))
    ]
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        flat = (v if isinstance(v, tuple) else (v,) for v in row.values())
        writer.writerow([number for values in flat for number in values])
    return stream.getvalue()


if __name__ == "__main__":
    config_flags.run(main)
