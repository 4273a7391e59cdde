"""A whole run: the simulation with evaluations, the record on disk, checkpoints and progress."""

import contextlib
import errno
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedrevive_jax import data, plots, record
from fedrevive_jax.checkpoint import Checkpoints
from fedrevive_jax.config import Config, ConfigError
from fedrevive_jax.dfkd.pool import Pool
from fedrevive_jax.models import Model
from fedrevive_jax.models.model import Params
from fedrevive_jax.planning import staleness_summary
from fedrevive_jax.server import Receipt
from fedrevive_jax.simulator import Simulation


@dataclass(frozen=True)
class Result:
    """What a run gives.

    Attributes:
      params: the final global parameters.
      summary: what `summary.json` holds.
      evaluations: rows with version, time, wall_seconds, accuracy, loss.
      resumed_version: the version of the checkpoint it continued from, or None.
    """

    params: Params
    summary: dict[str, Any]
    evaluations: list[dict[str, Any]]
    resumed_version: int | None = None


def run(
    config: Config,
    *,
    dataset: data.Dataset | None = None,
    model: Model | None = None,
    keep_record: bool = False,
    overwrite: bool = False,
) -> Result:
    """Runs a configuration to its end.

    Args:
      config: what to run, see `presets.resolve`.
      dataset, model: stand in for those that the configuration names.
      keep_record: write `config.run_dir`, and continue from its newest checkpoint if there is one.
        A finished run is read, not run again.
      overwrite: start afresh in a folder that holds a run.

    Raises:
      ConfigError: the data, or the folder, is not what the configuration needs. Nothing has been
        trained or written then.
    """
    finished = keep_record and is_finished(config, overwrite)
    simulation = Simulation(config, dataset, model)
    if finished:
        return _read_finished(simulation)
    if keep_record:
        _open_run_dir(config, overwrite)
    recorder = _Recorder(simulation, config.run_dir if keep_record else None)
    with contextlib.closing(recorder):
        recorder.resume()
        with _progress_bar(simulation) as progress:
            recorder.start()
            for receipt in simulation.arrivals():
                recorder.observe(receipt)
                progress.set_postfix_str(recorder.news, refresh=False)
                progress.update(1)
        return recorder.finish()


def is_finished(config: Config, overwrite: bool = False) -> bool:
    """Whether the run's folder holds this run, finished; decides without writing anything.

    Raises:
      ConfigError: the folder is not a run's folder, or holds a run of another configuration and
        must not be overwritten.
    """
    folder = config.run_dir
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--workdir={folder}: is not a folder")
    contents = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    recorded = record.CONFIG in contents
    foreign = contents - {record.CONFIG + ".partial"}
    if foreign and not recorded:
        raise ConfigError(
            f"--workdir={folder}: holds {min(foreign)} but no {record.CONFIG}; give an empty or "
            "a new folder"
        )
    if not recorded or overwrite:
        return False
    differences = record.configured_differently(folder, config)
    if differences:
        raise ConfigError(
            f"--workdir={folder}: holds a run with another configuration "
            f"({'; '.join(differences)}); use --overwrite to start afresh"
        )
    return record.SUMMARY in contents


def _open_run_dir(config: Config, overwrite: bool) -> None:
    """Makes the run's folder, empties it if it is to be overwritten, and writes config.json."""
    folder = config.run_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if overwrite:
            # The configuration goes last: without it the folder would be refused as foreign.
            for path in sorted(folder.iterdir(), key=lambda path: path.name == record.CONFIG):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not (folder / record.CONFIG).exists():
            record.write_json(folder / record.CONFIG, config.as_dict())
    except OSError as error:
        raise ConfigError(f"--workdir={folder}: cannot be written ({error.strerror})") from None


def _progress_bar(simulation: Simulation):
    from tqdm import tqdm

    return tqdm(
        total=simulation.schedule.num_arrivals,
        initial=simulation.position,
        unit=" arrivals",
        disable=not sys.stderr.isatty(),
        dynamic_ncols=True,
    )


class _Recorder:
    """Watches a simulation: evaluates, keeps rows, writes files and checkpoints.

    Device results are fetched a window late, so that the host does not wait for each arrival.
    """

    def __init__(self, simulation: Simulation, run_dir: Path | None):
        self._simulation = simulation
        self._config = simulation.config
        self._run_dir = run_dir
        self._evaluations: list[dict[str, Any]] = []
        self._pending: list[tuple[int, Receipt]] = []
        self._wall_before = 0.0
        self._began = time.monotonic()
        self._resumed: int | None = None
        self._checkpoints = self._metrics = self._arrivals = self._events = None
        self.news = ""
        if run_dir is not None:
            self._checkpoints = Checkpoints(run_dir, self._config.checkpoint_keep)

    def resume(self) -> None:
        """Continues from the newest checkpoint, cutting the rows that came after it."""
        if self._run_dir is None:
            return
        sizes = {record.METRICS: 0, record.ARRIVALS: 0}
        steps = self._checkpoints.steps()
        if steps:
            simulation, step = self._simulation, steps[-1]
            saved = self._checkpoints.record(step)
            params, arrays = self._checkpoints.state(
                step, simulation.server.params, simulation.shapes(saved["simulation"])
            )
            simulation.restore(saved["simulation"], params, arrays)
            sizes, self._wall_before = saved["sizes"], saved["wall_seconds"]
            self._resumed = step
        self._metrics = record.Rows(self._run_dir / record.METRICS, sizes[record.METRICS])
        self._arrivals = record.Rows(self._run_dir / record.ARRIVALS, sizes[record.ARRIVALS])
        self._evaluations = _read_evaluations(self._run_dir)
        from tensorboardX import SummaryWriter

        self._events = SummaryWriter(
            str(self._run_dir / record.EVENTS), purge_step=self._resumed, write_to_disk=True
        )

    def start(self) -> None:
        """Evaluates version 0 of a new run."""
        if not self._evaluations:
            self._evaluate(0.0)

    def observe(self, receipt: Receipt) -> None:
        """Takes note of one processed arrival."""
        simulation, config = self._simulation, self._config
        index = simulation.position - 1
        self._pending.append((index, receipt))
        if simulation.finished or simulation.starts_window:
            self._fetch()
        if receipt.new_version == receipt.version or simulation.finished:
            return
        if receipt.new_version % config.eval_every == 0:
            self._fetch()
            self._evaluate(float(simulation.schedule.time[index]))
        if receipt.new_version % config.checkpoint_every == 0:
            self._save()

    def finish(self) -> Result:
        """The last evaluation, the last checkpoint, pictures, and the summary."""
        simulation, clock = self._simulation, self._simulation.schedule
        self._fetch()
        end = float(clock.time[-1]) if clock.num_arrivals else 0.0
        if self._evaluations[-1]["version"] != simulation.server.version:
            self._evaluate(end)
        accuracies = [row["accuracy"] for row in self._evaluations]
        summary = {
            "method": self._config.method,
            "dataset": simulation.dataset.name,
            "model": simulation.model.name,
            "seed": self._config.seed,
            "final_accuracy": accuracies[-1],
            "best_accuracy": max(accuracies),
            "versions": simulation.server.version,
            "arrivals": clock.num_arrivals,
            "windows": len(simulation.windows),
            "simulated_time": end,
            "wall_seconds": self._wall_seconds(),
            **staleness_summary(clock.staleness),
            "device": str(jax.devices()[0].device_kind),
        }
        if self._run_dir is not None:
            self._save()
            self._checkpoints.close()
            self._pictures()
            record.write_json(self._run_dir / record.SUMMARY, summary)
        return Result(simulation.server.params, summary, self._evaluations, self._resumed)

    def close(self) -> None:
        for stream in (self._metrics, self._arrivals, self._events):
            if stream is not None:
                stream.close()

    def _wall_seconds(self) -> float:
        return round(self._wall_before + time.monotonic() - self._began, 3)

    def _evaluate(self, now: float) -> None:
        result = self._simulation.evaluate()
        version = self._simulation.server.version
        row = {
            "version": version,
            "time": now,
            "wall_seconds": self._wall_seconds(),
            "accuracy": result.accuracy,
            "loss": result.loss,
        }
        self._evaluations.append(row)
        seen = self._simulation.schedule.staleness[: self._simulation.position]
        mean = float(np.mean(seen)) if len(seen) else 0.0
        self.news = f"t={now:.1f} v={version} accuracy={result.accuracy:.3f} staleness={mean:.1f}"
        if self._run_dir is not None:
            self._metrics.append({"kind": "evaluation", **row})
            self._metrics.flush()
            self._events.add_scalar("accuracy", result.accuracy, version)
            self._events.add_scalar("loss", result.loss, version)

    def _fetch(self) -> None:
        """Brings the device results of the pending arrivals to the host and writes their rows."""
        if self._run_dir is not None and self._pending:
            results = jax.device_get([(r.accepted, r.metrics) for _, r in self._pending])
            for (index, receipt), (accepted, metrics) in zip(self._pending, results, strict=True):
                self._write_arrival(index, receipt, bool(accepted), metrics)
            self._arrivals.flush()
            self._metrics.flush()
        self._pending.clear()

    def _write_arrival(self, index: int, receipt: Receipt, accepted: bool, metrics) -> None:
        now = float(self._simulation.schedule.time[index])
        values = {name: float(value) for name, value in metrics.items()}
        self._arrivals.append(
            {
                "index": index,
                "time": now,
                "client": receipt.client,
                "base_version": receipt.base_version,
                "version": receipt.version,
                "staleness": receipt.staleness,
                "beta": values.pop("beta"),
                "accepted": accepted,
            }
        )
        # A row of DFKD losses whenever images were made; the distillation loss goes with it.
        if np.isfinite(values.get("synthesis", np.nan)):
            row = {"kind": "dfkd", "version": receipt.version, "time": now, **values}
            self._metrics.append(row)
            for name, value in values.items():
                if np.isfinite(value):
                    self._events.add_scalar(f"dfkd/{name}", value, receipt.version)

    def _save(self) -> None:
        if self._run_dir is None:
            return
        self._fetch()
        plain, arrays = self._simulation.snapshot()
        saved = {
            "version": plain["version"],
            "simulation": plain,
            "wall_seconds": self._wall_seconds(),
            "sizes": {
                record.METRICS: self._metrics.flush(),
                record.ARRIVALS: self._arrivals.flush(),
            },
        }
        self._checkpoints.save(saved, self._simulation.server.params, arrays)

    def _pictures(self) -> None:
        config, simulation = self._config, self._simulation
        title = f"{config.method} on {simulation.dataset.name}, seed {config.seed}"
        staleness = [row["staleness"] for row in record.read_rows(self._run_dir / record.ARRIVALS)]
        plots.curves(self._run_dir / "curves.png", title, self._evaluations, staleness)
        for pool in _pools(simulation.server.method_state):
            images, labels, added = jax.device_get(pool)
            # Oldest first: the ring's next place is its oldest.
            order = np.roll(np.arange(len(labels)), -int(added) % len(labels))
            plots.synthetic(
                self._run_dir / "synthetic.png",
                images[order],
                labels[order],
                simulation.dataset.num_classes,
            )


def _pools(state: Any) -> list[Pool]:
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, Pool))
    return [leaf for leaf in leaves if isinstance(leaf, Pool)]


def _read_evaluations(folder: Path) -> list[dict[str, Any]]:
    rows = record.read_rows(folder / record.METRICS)
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    return [{key: row[key] for key in row if key != "kind"} for row in evaluations]


def _read_finished(simulation: Simulation) -> Result:
    """The result of a run that is finished, from its record."""
    folder = simulation.config.run_dir
    checkpoints = Checkpoints(folder, read_only=True)
    params = checkpoints.params(checkpoints.steps()[-1], simulation.server.params)
    checkpoints.close()
    summary = record.read_json(folder / record.SUMMARY)
    return Result(params, summary, _read_evaluations(folder))
