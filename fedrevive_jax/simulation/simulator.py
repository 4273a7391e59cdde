"""The simulation: windows -> local training -> server steps, in exactly the planned order."""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Collection, Iterator, Set
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedrevive_jax import data
from fedrevive_jax.clients import feed as feeds
from fedrevive_jax.clients.evaluation import Evaluation, make_evaluator
from fedrevive_jax.clients.local_training import make_window_trainer
from fedrevive_jax.clock import schedule
from fedrevive_jax.compute import chips, devices, environment, trees
from fedrevive_jax.compute.streams import Stream, jax_key
from fedrevive_jax.config import Config
from fedrevive_jax.data import partition
from fedrevive_jax.data.dataset import warn_of_missing_classes
from fedrevive_jax.data.partition import Shards
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.messages import Upload
from fedrevive_jax.models import Model, judging
from fedrevive_jax.models.model import Params
from fedrevive_jax.record.derived import Derived
from fedrevive_jax.server import builder
from fedrevive_jax.server.admission import Rejection
from fedrevive_jax.server.core import Receipt
from fedrevive_jax.server.shelf import device_bytes, device_memory, shelf
from fedrevive_jax.simulation import fitting, sizing

NOTHING = Derived()
# One server step in so many is timed. Timing waits for the device; the number shares no factor
# with the intervals at which synthesis usually runs, so that it is timed as often as it is due.
TIMED_EVERY = 37
# Results are fetched from the device, and written, once in about so many arrivals.
SETTLED_EVERY = 32


class Simulation:
    """One run in memory: the plan, the population, the server, and the uploads under way.

    Attributes:
      config, dataset, model: what it was built from.
      origin: where the first parameters, and for text the tokenizer, come from; for the record.
      feed: the data set on the device and the way from it to the model.
      frozen: arrays of the model that nobody trains.
      client_batch: jobs that are trained in one call of a device at most.
      schedule, windows: the plan; each window is a call.
      jobs_in_a_call: jobs that all devices together train in one call.
      mesh: the devices that compute together, or None.
      server: the server core.
      position: arrivals processed so far.
      step_seconds: what a sample of the server steps took since this object was made.
      jobs_restarted: jobs that were in flight when the run was continued from a checkpoint that
        does not hold them, and started again. 0: the run is exactly what was planned.
    """

    def __init__(
        self,
        config: Config,
        dataset: data.Dataset | None = None,
        model: Model | None = None,
        derived: Derived = NOTHING,
    ):
        """Builds everything from a configuration.

        Args:
          config: what to simulate.
          dataset, model: stand in for those that the configuration names.
          derived: what an earlier part of the same run has derived from its data.
        """
        environment.check()
        self.config = config
        self.mesh = devices.make_mesh(config.mesh)
        self.dataset = dataset if dataset is not None else data.load(config, derived.tokenizer)
        self.model = judging.fitting(config, self.dataset, model)
        for split in ("train", config.eval_split):
            self.dataset.positions(split)  # refused where it is empty
        warn_of_missing_classes(self.dataset)
        self._shards = derived.shards or partition.create(config, self.dataset)

        self.position = 0
        self.step_seconds: list[float] = []
        self._compiled: Future[None] | None = None
        self._uploads: dict[int, Upload] = {}
        self._planned = self.schedule = schedule.create(config)

        start = builder.start(config, self.model, self.dataset, self.mesh, derived.origin)
        self.origin, self.frozen = start.origin, start.frozen
        self.feed = feeds.make_feed(self.dataset, start.frozen)
        self._store, self._labels = devices.replicate(
            self.mesh, (self.feed.store, self.dataset.labels)
        )
        holdings = builder.holdings(
            config,
            self.model,
            self.dataset,
            self.feed.augment,
            self.feed.augment_real,
            start.frozen,
            class_mixes=self._shards.class_mixes(self.dataset.labels, self.dataset.num_classes),
            mesh=self.mesh,
        )
        self._inputs = (start.frozen, holdings.seed_text)
        room = sizing.room(
            config,
            holdings,
            start.params,
            stored=self.dataset.samples,
            waiting=self.schedule.live_versions_max() + config.concurrency,
            memory=device_bytes(),
            fast=chips.fast_memory(jax.local_devices()[0].device_kind),
        )
        self._shelf, self.client_batch = shelf(room.place, self.mesh), room.client_batch
        # By the plan alone: a job's rounding may depend on the size of its call, in bfloat16 by 1%
        # of the update, so that neither `window_limit` nor an interruption may change it.
        self.jobs_in_a_call = sizing.jobs_in_a_call(
            self._planned, self.client_batch, 1 if self.mesh is None else self.mesh.size
        )
        self._follow([])

        config = dataclasses.replace(config, teacher_batch=room.teacher_batch)
        self.server = builder.create(
            config, start.params, holdings, shelf=self._shelf, beside=room.beside
        )
        self._train = make_window_trainer(
            self.model,
            self.feed.training,
            config.client_lr,
            lambda job, step: jax_key(config.seed, Stream.AUGMENTATION, job, step),
            self.mesh,
            self.server.client_part,
        )
        self._evaluate = make_evaluator(
            self.model, self.feed.evaluation, config.eval_batch, self.mesh
        )
        self._hand_out(self.schedule.initial_jobs)
        self._room = room
        # As it is before anything is trained, with all in place that stays.
        self._memory = self._memory_unchecked = device_memory()

    @property
    def shards(self) -> Shards:
        """Who holds what."""
        return self._shards

    @property
    def derived(self) -> Derived:
        """What was derived from the data, to be kept with the run."""
        tokenizer = self.dataset.tokenizer
        return Derived(tokenizer.serialised if tokenizer else "", self._shards, self.origin)

    @property
    def version_memory(self) -> str:
        """Where stale versions and uploads wait, `device` or `host`."""
        return self._shelf.name

    @property
    def uploads(self) -> dict[int, Upload]:
        """Uploads that are trained and have not arrived, by job."""
        return dict(self._uploads)

    @property
    def restarts_in_words(self) -> str:
        return "with checkpoint_mode=params: not exact, the jobs in flight start again from it"

    @property
    def settled(self) -> dict[str, Any]:
        """What was chosen from the memory of the device where it was left open."""
        return {"client_batch": self.client_batch, "version_memory": self.version_memory}

    @property
    def planned_arrivals(self) -> int:
        return self.schedule.num_arrivals

    @property
    def finished(self) -> bool:
        return self.position == self.schedule.num_arrivals

    @property
    def now(self) -> float:
        """Simulated time of the last arrival; 0 before the first."""
        return float(self.schedule.time[self.position - 1]) if self.position else 0.0

    @property
    def started(self) -> float:
        """Simulated time at which the job of the last arrival was handed out."""
        return float(self.schedule.start[self.schedule.job[self.position - 1]])

    @property
    def staleness(self) -> np.ndarray:
        """Of the arrivals so far, int [position]."""
        return self.schedule.staleness[: self.position]

    @property
    def window_starts(self) -> Set[int]:
        """Arrivals before which a window of jobs is trained."""
        return self._first_of_window.keys()

    @property
    def is_settled(self) -> bool:
        """Whether the last arrival was the first of a window, which is on the device by now and
        keeps it busy; and enough of them since the last such one."""
        return self.position - 1 in self._settling

    @property
    def facts(self) -> dict[str, Any]:
        """What the summary says of a simulation."""
        return {
            "windows": len(self.windows),
            "faults": self.schedule.faults,
            "simulated_time": self.now,
        }

    def is_first_after(self, interval: float, version: int) -> bool:
        """Whether a version is the first since a multiple of an interval of simulated time."""
        return self.schedule.is_first_after(interval, version)

    @property
    def bytes_sent(self) -> int:
        """What clients and server have sent so far: a model down for each job that was handed out,
        a model with its feature statistics up for each arrival, and what the method sends beside.
        """
        server = self.server
        down = trees.nbytes(server.download_of(server.version))
        upload = server.upload_like()
        up = trees.nbytes((upload.params, upload.taps, upload.extra))
        return server.next_job * down + self.position * up

    def arrivals(self) -> Iterator[Receipt]:
        """Processes arrivals one by one until the plan is done."""
        while not self.finished:
            yield self.advance()

    def train_ahead(self) -> None:
        """Trains the window of the next arrival, if that arrival needs it and has none yet."""
        self._compile_server_step()
        window = self._first_of_window.get(self.position)
        if window is not None and int(window.jobs[0]) not in self._uploads:
            trained = self.train_jobs(window.jobs)
            self._uploads.update((job, self._shelf.store(own)) for job, own in trained.items())

    def _compile_server_step(self) -> None:
        """Begins it, once, beside the compilation of the training and the first window's.

        Of several processes each compiles when it gets there, all in the same order.
        """
        if self._compiled is None and jax.process_count() == 1:
            one = ThreadPoolExecutor(1, "server step")
            self._compiled = one.submit(self._check_server_step)
            one.shutdown(wait=False)

    def _check_server_step(self) -> None:
        """Compiles it, and sees whether it fits."""
        compiled, room = self.server.compile(), self._room
        if self._memory is not None:
            fitting.check_server_step(
                self.config, compiled, self._memory, room.beside, room.teacher_batch
            )

    def _check_training(self, call: tuple[Any, ...]) -> None:
        """Compiles a call of training where the device tells its memory, and sees whether it fits.

        The call itself finds it compiled. Of several processes none may stop alone.
        """
        memory, self._memory_unchecked = self._memory_unchecked, None
        if memory is not None and jax.process_count() == 1:
            compiled = self._train.lower(*call).compile()
            fitting.check_training(
                self.config, compiled, memory, self._room.beside, self.client_batch
            )

    def advance(self) -> Receipt:
        """Processes the next arrival, training its window first when it needs one."""
        self.train_ahead()
        if self._compiled is not None:
            self._compiled.result()  # what went wrong there is told here
        index = self.position
        job = int(self.schedule.job[index])
        upload = self._shelf.fetch(self._uploads.pop(job))
        if self.schedule.fault[job] == schedule.Fault.NAN:
            upload = _broken(upload)
        timed = index % TIMED_EVERY == TIMED_EVERY - 1  # not the first step, which compiles
        if timed:
            jax.block_until_ready((upload, self.server.params, self.server.method_state))
        began = time.perf_counter()
        receipt = self.server.submit(job, upload)
        if timed:
            jax.block_until_ready((self.server.params, self.server.method_state))
            self.step_seconds.append(time.perf_counter() - began)
        if isinstance(receipt, Rejection):
            raise ValueError(f"{receipt.reason}: {receipt.detail}")  # of the simulation's own
        self._hand_out(int(self.schedule.jobs_started[index]))
        self.position = index + 1
        return receipt

    def evaluate(self, params: Params | None = None, split: str | None = None) -> Evaluation:
        """Evaluates parameters (the newest by default) on a split (the configured by default)."""
        params = self.server.params if params is None else params
        positions = self.dataset.positions(split or self.config.eval_split)
        return self._evaluate(params, self._store, self._labels, positions)

    @property
    def fingerprint(self) -> str:
        """A digest of the plan, of who holds what, of the data, and of the files that are read."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        plan = self._planned
        for array in (
            plan.job,
            plan.time,
            plan.client,
            plan.base_version,
            plan.fault,
            self._shards.indices,
            self._shards.offsets,
            self.dataset.labels,
            self.dataset.samples,
            *(self.dataset.splits[name] for name in sorted(self.dataset.splits)),
            *map(np.asarray, jax.tree.leaves(self._inputs)),
        ):
            digest.update(np.ascontiguousarray(array).tobytes())
        digest.update(repr(self.dataset.preprocessing).encode())
        return digest.hexdigest()

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Everything a continuation needs: (plain record, pytree of arrays).

        With `checkpoint_mode=params` it is the snapshot of a simulation whose jobs in flight have
        just started again from the newest version, so that no other version and no upload is part
        of it; this simulation itself goes on as it was.
        """
        exact = self.config.checkpoint_mode == "exact"
        record, arrays = self.server.snapshot(exact)
        uploads = {job: upload._asdict() for job, upload in self._uploads.items() if exact}
        now = [] if exact else [[self.position, self.server.version]]
        record = {
            **record,
            "position": self.position,
            "uploads": sorted(uploads),
            "restarts": self._restarts + now,
            "fingerprint": self.fingerprint,
        }
        return record, {**arrays, "uploads": {str(job): tree for job, tree in uploads.items()}}

    def check(self, record: dict[str, Any]) -> None:
        """Whether a snapshot is one of this simulation.

        Raises:
          ConfigError: it belongs to another plan or to other data.
        """
        if record.get("fingerprint") != self.fingerprint:
            raise ConfigError(
                "workdir",
                self.config.run_dir,
                "the checkpoint belongs to another plan or other "
                "data (a file that the run reads has changed); use overwrite=True to start afresh",
            )

    def shapes(self, record: dict[str, Any]) -> dict[str, Any]:
        """The structure and shapes of a snapshot's arrays, told from its record."""
        steps = (self.config.local_iterations, self.config.batch_size)
        (upload,) = jax.eval_shape(
            self._train,
            (self.server.download_of(self.server.version),),
            self._store,
            self._labels,
            jax.ShapeDtypeStruct((1, *steps), jnp.int32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
        )
        uploads = {str(job): upload._asdict() for job in record["uploads"]}
        return {**self.server.shapes(record), "uploads": uploads}

    def restore(self, record: dict[str, Any], params: Params, arrays: dict[str, Any]) -> None:
        """Continues from a snapshot of this simulation, see `check`.

        Args:
          record: the snapshot's plain record.
          params: the parameters of its newest version, arrays of JAX or NumPy.
          arrays: all its other arrays.
        """
        self._follow(record["restarts"], record["position"], record["uploads"])
        self.server.restore(record, params, arrays)
        # One by one: on their way to the host they need not all fit on the device.
        self._uploads = {
            int(job): self._shelf.store(devices.replicate(self.mesh, Upload(**upload)))
            for job, upload in arrays["uploads"].items()
        }
        self.position = record["position"]

    def _follow(
        self, restarts: list[list[int]], position: int = 0, trained: Collection[int] = ()
    ) -> None:
        """Takes over the plan, with what (position, version) the jobs in flight were restarted at.

        Windows from `position` on are planned from what is trained by then: that depends on the
        size of a call, which may have been another on the devices of an earlier part of the run.
        """
        self._restarts, self.jobs_restarted = restarts, 0
        plan = self._planned
        for restarted, version in restarts:
            self.jobs_restarted += int(schedule.in_flight(plan, restarted).sum())
            plan = schedule.restart_in_flight(plan, restarted, version)
        self.schedule = plan
        start = restarts[-1][0] if restarts else 0
        plan_calls = functools.partial(sizing.plan_calls, self.config, plan, self.jobs_in_a_call)
        gone = [window for window in plan_calls(start) if window.first_arrival < position]
        self.windows = gone + plan_calls(position, trained)
        self._first_of_window = {window.first_arrival: window for window in self.windows}
        # The first window of every so many arrivals.
        first = {index // SETTLED_EVERY: index for index in sorted(self._first_of_window)[::-1]}
        self._settling = set(first.values())

    def _hand_out(self, up_to: int) -> None:
        """Dispatches planned jobs until `up_to` are handed out.

        Those whose uploads will be lost are given up at once: nothing needs their versions.
        """
        plan = self.schedule
        for job in range(self.server.next_job, int(up_to)):
            self.server.dispatch(int(plan.client[job]))
            if plan.fault[job] == schedule.Fault.LOST:
                self.server.give_up(job)

    def train_jobs(self, jobs: np.ndarray) -> dict[int, Upload]:
        """Trains jobs in calls of a fixed size; the last call is padded by repetition.

        Every call is the same compiled program whatever its jobs, and each job's result depends on
        its own inputs alone.

        Args:
          jobs: int [n], numbers of jobs whose starting versions are live.

        Returns:
          Their uploads, by job.
        """
        trained, size = {}, self.jobs_in_a_call
        for start in range(0, len(jobs), size):
            together = jobs[start : start + size]
            padded = np.resize(together, size)
            indices = [
                self._shards.batches(
                    int(self.schedule.client[job]),
                    int(self.schedule.visit[job]),
                    steps=self.config.local_iterations,
                    batch_size=self.config.batch_size,
                    seed=self.config.seed,
                )
                for job in padded
            ]
            bases = tuple(
                self.server.download_of(int(self.schedule.base_version[job])) for job in padded
            )
            call = (
                bases,
                self._store,
                self._labels,
                np.stack(indices).astype(np.int32),
                padded.astype(np.int32),
            )
            self._check_training(call)
            uploads = self._train(*call)
            trained.update(zip(together.tolist(), uploads, strict=False))
        return trained


@jax.jit
def _broken(upload: Upload) -> Upload:
    """An upload whose parameters are not numbers, as a failed client may send it."""
    return upload._replace(
        params=jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), upload.params)
    )
