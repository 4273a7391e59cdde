"""Watches a run: evaluates it, keeps its record on disk, writes checkpoints."""

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedrevive_jax.clock.schedule import staleness_summary
from fedrevive_jax.compute import processes
from fedrevive_jax.compute.rows import unpacked
from fedrevive_jax.dfkd.pool import Pool
from fedrevive_jax.models.model import Params
from fedrevive_jax.pages import run as page
from fedrevive_jax.record import archive, files, plots
from fedrevive_jax.record.checkpoint import Checkpoints, Saved
from fedrevive_jax.record.health import Health
from fedrevive_jax.record.trackers import Trackers
from fedrevive_jax.running.runnable import Runnable
from fedrevive_jax.server.admission import VERDICTS
from fedrevive_jax.server.core import Receipt

_LOG = logging.getLogger(__name__)


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


class _Record(NamedTuple):
    """The folder of a run, its files open."""

    folder: Path
    metrics: files.Rows
    arrivals: files.Rows
    trackers: Trackers
    checkpoints: Checkpoints


class Recorder:
    """Watches a run: evaluates, keeps rows, writes files and checkpoints.

    Device results of a window's arrivals are fetched once the next window has been handed to the
    device, so that the host rarely waits and the device hardly ever.
    """

    def __init__(
        self,
        run: Runnable,
        run_dir: Path | None,
        publish: Callable[[], None] = lambda: None,
        save_seconds: float = 0.0,
    ):
        """Opens a folder, if there is one.

        Args:
          run: what is watched.
          run_dir: the folder.
          publish: called whenever the folder holds something new that is whole.
          save_seconds: see `runner.run`.
        """
        self._publish = publish
        self._run = run
        self._config = run.config
        self._evaluations: list[dict[str, Any]] = []
        self._pending: list[tuple[int, float, float, Receipt]] = []
        self._wall_before = 0.0
        self._began = self._saved_at = time.monotonic()
        self._save_seconds = save_seconds
        self._resumed: int | None = None
        self._health = Health(self._config.reject_limit)
        self._saved_position: int | None = None
        self._folder: tuple[Path, Checkpoints] | None = None
        if run_dir is not None:
            kept = self._config.checkpoint_keep
            self._folder = run_dir, Checkpoints(run_dir, kept, publish=publish)
        self._record: _Record | None = None  # once it is open, see `resume`

    def resume(self) -> None:
        """Continues from the newest checkpoint that is whole, cutting the rows that came after it.

        The process that has the folder shares what it finds there.

        Raises:
          ConfigError: the checkpoints are of another plan or other data, or none is whole.
        """
        sizes = {files.METRICS: 0, files.ARRIVALS: 0}
        found = processes.first(self._newest)
        if found is not None:
            self._resumed, (saved, params, arrays) = found
            run = self._run
            run.restore(saved["simulation"], params, arrays)
            sizes = {name: rows["size"] for name, rows in saved["rows"].items()}
            self._wall_before = saved["wall_seconds"]
            self._saved_position = run.position
            if run.jobs_restarted and self._folder is not None:
                _LOG.warning(
                    "continued from version %d, %s (%d in the whole run)",
                    self._resumed,
                    run.restarts_in_words,
                    run.jobs_restarted,
                )
        self._evaluations, self._health = processes.first(lambda: self._open(sizes))

    def _newest(self) -> tuple[int, Saved] | None:
        """The newest checkpoint that is whole, and its version."""
        if self._folder is None:
            return None
        folder, checkpoints = self._folder
        return checkpoints.newest_good(lambda step: self._load(folder, checkpoints, step))

    def _load(self, folder: Path, checkpoints: Checkpoints, step: int) -> Saved:
        run = self._run
        saved = checkpoints.record(step)
        run.check(saved["simulation"])
        for name in (files.METRICS, files.ARRIVALS):
            # Rows before an older checkpoint may be whole still.
            archive.check_start(folder / name, **saved["rows"][name])
        return checkpoints.load(
            step,
            run.server.params,
            lambda saved: run.shapes(saved["simulation"]),
        )

    def _open(self, sizes: dict[str, int]) -> tuple[list[dict[str, Any]], Health]:
        """Opens the files of rows at the sizes that count; returns the evaluations in them, and
        the run's health by them."""
        if self._folder is None:
            return [], self._health
        folder, checkpoints = self._folder
        metrics = files.Rows(folder / files.METRICS, sizes[files.METRICS])
        arrivals = files.Rows(folder / files.ARRIVALS, sizes[files.ARRIVALS])
        trackers = Trackers(self._config.tracker_names, folder, self._config)
        self._record = _Record(folder, metrics, arrivals, trackers, checkpoints)
        for row in files.read_rows(folder / files.METRICS):
            self._health.metrics(row)
            trackers.add(row)
        for row in files.read_rows(folder / files.ARRIVALS):
            self._health.arrival(row)
        return read_evaluations(folder), self._health

    def start(self) -> None:
        """Evaluates version 0 of a new run.

        Raises:
          DivergenceError, RejectLimitError: what was recorded already has to be the end.
        """
        if not self._evaluations:
            self._evaluate()
        self._judge()

    def observe(self, receipt: Receipt) -> None:
        """Takes note of one processed arrival.

        Raises:
          DivergenceError, RejectLimitError: the run has to stop; a checkpoint is written.
        """
        run, config = self._run, self._config
        if run.is_settled:
            # All before this arrival.
            self._fetch(leave=1)
        self._pending.append((run.position - 1, run.now, run.started, receipt))
        if receipt.new_version > receipt.version and not run.finished:
            if self._is_evaluated(receipt.new_version):
                self._fetch()
                self._evaluate()
            if receipt.new_version % config.checkpoint_every == 0:
                self._save()
        self.rest()
        self._judge()

    def rest(self) -> None:
        """Saves what nobody has saved for `save_seconds`; asked also while no arrival comes."""
        if 0 < self._save_seconds <= time.monotonic() - self._saved_at:
            self._save()

    def _is_evaluated(self, version: int) -> bool:
        """Whether an evaluation is due at a version; the plan says it, wherever a run was
        interrupted."""
        interval = self._config.eval_interval
        if interval:
            return self._run.is_first_after(interval, version)
        return version % self._config.eval_every == 0

    def save_now(self) -> str:
        """Saves where the run stands, waits until that is on disk, and tells it in words."""
        if self._record is None:
            return "nothing was saved"
        self._save()
        self._record.checkpoints.wait()
        return f"saved at version {self._run.server.version}"

    def finish(self) -> Result:
        """The last evaluation, the last checkpoint, pictures, and the summary."""
        run = self._run
        self._fetch()
        for term, share in self._health.rejected_terms.items():
            if share > 0.5:
                _LOG.warning(
                    "the loss guard rejected the %s loss in %.0f%% of its steps, so that it hardly "
                    "moved anything; see `loss_guard`",
                    term,
                    100 * share,
                )
        if self._evaluations[-1]["version"] != run.server.version:
            self._evaluate()
        self._judge()
        accuracies = [row["accuracy"] for row in self._evaluations]
        summary = {
            "method": self._config.method,
            "dataset": run.dataset.name,
            "model": run.model.name,
            "seed": self._config.seed,
            **run.origin,
            "final_accuracy": accuracies[-1],
            "best_accuracy": max(accuracies),
            "versions": run.server.version,
            "arrivals": run.position,
            "rejected": run.server.rejected,
            "skipped": self._health.skipped,
            "loss_guard_rejected": self._health.rejected_terms,
            "revived": self._health.revived,
            "jobs_restarted": run.jobs_restarted,
            **run.facts,
            "wall_seconds": self._wall_seconds(),
            "server_seconds_per_arrival": _mean_or_none(run.step_seconds),
            "bytes_sent": run.bytes_sent,
            **staleness_summary(run.staleness),
            "device": str(jax.devices()[0].device_kind),
            "devices": 1 if run.mesh is None else run.mesh.size,
        }
        if self._record is not None:
            record = self._record
            self._save()
            record.checkpoints.wait()
            _draw("the pictures", lambda: self._pictures(record.folder))
            _draw(page.NAME, lambda: page.write(record.folder, summary))
            files.write_json(record.folder / files.SUMMARY, summary)
            # Last: what others do with it may take long.
            record.trackers.close(summary)
            self._publish()
        return Result(run.server.params, summary, self._evaluations, self._resumed)

    def close(self) -> None:
        """Makes everything durable; errors of a save under way are raised."""
        with contextlib.ExitStack() as stack:
            if self._record is not None:
                for stream in (self._record.metrics, self._record.arrivals, self._record.trackers):
                    stack.callback(stream.close)
            if self._folder is not None:
                stack.callback(self._folder[1].close)

    def news(self) -> str:
        """Where the run stands, for a progress bar."""
        run = self._run
        seen = run.staleness
        return (
            f"t={run.now:.1f} version={run.server.version} "
            f"accuracy={self._evaluations[-1]['accuracy']:.3f} "
            f"staleness={seen.mean() if len(seen) else 0.0:.1f}"
        )

    def _wall_seconds(self) -> float:
        return round(self._wall_before + time.monotonic() - self._began, 3)

    def _evaluate(self) -> None:
        result = self._run.evaluate()
        row = {
            "version": self._run.server.version,
            "time": self._run.now,
            "wall_seconds": self._wall_seconds(),
            "accuracy": result.accuracy,
            "loss": result.loss,
        }
        self._evaluations.append(row)
        self._add_metrics({"kind": "evaluation", **row})
        self._count_pool(row["version"], row["time"])
        if self._record is not None:
            self._record.metrics.flush()
            self._record.trackers.flush()

    def _count_pool(self, version: int, now: float) -> None:
        """Records how many samples of each class the server has made and kept."""
        if self._record is None or self._config.samples == "real":
            return  # real samples are all there from the start
        for pool in _pools(self._run.server.method_state):
            labels = np.asarray(jax.device_get(pool.labels))
            counts = np.bincount(labels[labels >= 0], minlength=self._run.dataset.num_classes)
            self._add_metrics(
                {"kind": "pool", "version": version, "time": now, "counts": counts.tolist()}
            )

    def _judge(self) -> None:
        """Ends a run that makes no sense any more, with a checkpoint of where it stands."""
        if self._health.trouble is not None:
            self._save()
            if self._record is not None:
                folder = self._record.folder
                _draw(page.NAME, lambda: page.write(folder))
            raise self._health.trouble

    def _fetch(self, leave: int = 0) -> None:
        """Brings the device results of the pending arrivals to the host and writes their rows.

        Args:
          leave: how many of the newest arrivals are not pending yet.
        """
        if not self._pending:
            return
        results = jax.device_get([(r.loss, r.verdict, r.metrics) for *_, r in self._pending])
        for arrival, (loss, verdict, metrics) in zip(self._pending, results, strict=True):
            self._add_arrival(*arrival, float(loss), int(verdict), metrics)
        self._pending.clear()
        self._run.server.review(leave)
        if self._record is not None:
            self._record.arrivals.flush()
            self._record.metrics.flush()
            self._record.checkpoints.check()

    def _add_arrival(
        self,
        index: int,
        now: float,
        started: float,
        receipt: Receipt,
        loss: float,
        verdict: int,
        metrics: dict[str, Any],
    ) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        reason = VERDICTS[verdict]
        row = {
            "index": index,
            "time": now,
            "start": started,
            "client": receipt.client,
            "base_version": receipt.base_version,
            "version": receipt.version,
            "staleness": receipt.staleness,
            "beta": values.pop("beta"),
            "accepted": reason is None,
            "rejected": reason,
            "loss": loss,
        }
        self._health.arrival(row)
        if self._record is not None:
            self._record.arrivals.append(row)
        if any(np.isfinite(value) for value in values.values()):
            self._add_metrics({"kind": "dfkd", "version": receipt.version, "time": now, **values})

    def _add_metrics(self, row: dict[str, Any]) -> None:
        self._health.metrics(row)
        if self._record is not None:
            self._record.metrics.append(row)
            self._record.trackers.add(row)

    def _save(self) -> None:
        """Saves where the run stands, unless that is the last thing that was saved."""
        record = self._record
        if record is None or self._saved_position == self._run.position:
            return
        self._fetch()
        plain, arrays = self._run.snapshot()
        saved = {
            "version": plain["version"],
            "simulation": plain,
            "wall_seconds": self._wall_seconds(),
            "rows": {
                files.METRICS: record.metrics.flush(),
                files.ARRIVALS: record.arrivals.flush(),
            },
        }
        record.checkpoints.save(saved, self._run.server.params, arrays)
        self._saved_position, self._saved_at = self._run.position, time.monotonic()

    def _pictures(self, folder: Path) -> None:
        config, run = self._config, self._run
        title = f"{config.method} on {run.dataset.name}, seed {config.seed}"
        arrivals = files.read_rows(folder / files.ARRIVALS)
        staleness = [row["staleness"] for row in arrivals]
        plots.curves(folder / "curves.png", title, self._evaluations, staleness)
        if config.traits.distils:
            rows = files.read_rows(folder / files.METRICS)
            dfkd = [row for row in rows if row["kind"] == "dfkd"]
            # A rejected upload has no beta.
            betas = [row["beta"] or 0.0 for row in arrivals]
            plots.revival(folder / "revival.png", title, dfkd, betas)
        for pool in _synthetic_pools(run.server.method_state):
            images, labels, added = jax.device_get(pool[:3])
            images = unpacked(images, run.dataset.samples[0])
            # Oldest first: the ring's next place is its oldest.
            order = np.roll(np.arange(len(labels)), -int(added) % len(labels))
            plots.synthetic(
                folder / "synthetic.png",
                images[order],
                labels[order],
                run.dataset.num_classes,
            )


def _draw(name: str, draw: Callable[[], object]) -> None:
    """Draws something beside the results; whatever goes wrong with it, they count."""
    try:
        draw()
    except Exception as error:
        _LOG.warning("%s: not drawn (%s); the run is not affected", name, error)


def _mean_or_none(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _pools(state: Any) -> list[Pool]:
    """The pools in a method's state."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, Pool))
    return [node for node in nodes if isinstance(node, Pool)]


def _synthetic_pools(state: Any) -> list[Pool]:
    """The pools in a method's state that hold generated images (floats), not real ones (bytes)."""
    return [pool for pool in _pools(state) if _are_made_images(pool.samples)]


def _are_made_images(samples: Any) -> bool:
    return isinstance(samples, jax.Array) and jnp.issubdtype(samples.dtype, jnp.floating)


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """The evaluations of a recorded run: version, time, wall_seconds, accuracy, loss."""
    rows = files.read_rows(folder / files.METRICS)
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    return [{key: row[key] for key in row if key != "kind"} for row in evaluations]
