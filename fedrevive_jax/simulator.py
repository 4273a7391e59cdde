"""The simulation: windows -> local training -> server steps, in exactly the planned order."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedrevive_jax import data, delays, methods, models, schedule
from fedrevive_jax.config import Config, ConfigError
from fedrevive_jax.data import augment
from fedrevive_jax.evaluation import Evaluation, make_evaluator
from fedrevive_jax.local_training import make_window_trainer
from fedrevive_jax.messages import Upload
from fedrevive_jax.models import Model
from fedrevive_jax.models.model import Params
from fedrevive_jax.partition import partition
from fedrevive_jax.server import Receipt, Server
from fedrevive_jax.streams import Stream, jax_key


def make_schedule(config: Config) -> schedule.Schedule:
    """The plan of a configuration; needs neither data nor JAX."""
    return schedule.simulate(
        delays.create(config),
        num_clients=config.num_clients,
        concurrency=config.concurrency,
        buffer_size=config.buffer_size,
        open_slots=config.open_slots,
        max_time=config.max_time,
        max_versions=config.max_versions,
        seed=config.seed,
    )


def make_model(config: Config, dataset: data.Dataset) -> Model:
    """The model that a configuration names, for a data set's inputs and classes."""
    if config.model not in models.NETWORKS:
        raise ConfigError(
            f"--model={config.model}: is given from Python, run(config, model=...); by name: "
            + ", ".join(models.NETWORKS)
        )
    height, width = dataset.input_shape[:2]
    if height % 4 or width % 4:
        raise ConfigError(
            f"--dataset={config.dataset}: images of {height}x{width}; sides must be multiples of 4"
        )
    if config.model == "convnet" and min(height, width) < 18:
        raise ConfigError(
            f"--model=convnet: images of {height}x{width} are too small; 18x18 is the least"
        )
    return models.create(
        config.model,
        input_shape=dataset.input_shape,
        num_classes=dataset.num_classes,
        width=config.model_width,
        convolution=config.convolution,
    )


class Simulation:
    """One run in memory: the plan, the population, the server, and the uploads under way.

    Attributes:
      config, dataset, model: what it was built from.
      schedule, windows: the plan.
      server: the server core.
      position: arrivals processed so far.
    """

    def __init__(
        self, config: Config, dataset: data.Dataset | None = None, model: Model | None = None
    ):
        """Builds everything from a configuration; a data set or model given replaces the named."""
        self.config = config
        self.dataset = dataset if dataset is not None else data.load(config)
        self.model = model if model is not None else make_model(config, self.dataset)
        self._shards = partition(
            config.partition,
            self.dataset.splits["train"],
            self.dataset.labels,
            num_classes=self.dataset.num_classes,
            num_clients=config.num_clients,
            samples_per_client=config.samples_per_client,
            alpha=config.alpha,
            seed=config.seed,
            groups=self.dataset.groups,
        )
        self.schedule = make_schedule(config)
        self.windows = schedule.plan_windows(self.schedule, config.window_limit)
        self.position = 0
        self._first_of_window = {window.first_arrival: window for window in self.windows}
        self._uploads: dict[int, Upload] = {}

        how = self.dataset.preprocessing
        self._images = jnp.asarray(self.dataset.images)
        self._labels = jnp.asarray(self.dataset.labels)
        kept = self.dataset.splits["distillation"]
        ingredients = methods.Ingredients(
            model=self.model,
            augment=functools.partial(augment.synthetic_inputs, how=how),
            class_mixes=self._shards.class_mixes(self.dataset.labels, self.dataset.num_classes),
            real_images=(self.dataset.images[kept], self.dataset.labels[kept]),
        )
        params = self.model.init(jax_key(config.seed, Stream.MODEL_INIT))
        self.server = Server(methods.create(config, ingredients), params, config.seed)
        self._train = make_window_trainer(
            self.model,
            functools.partial(augment.client_inputs, how=how),
            config.client_lr,
            lambda job, step: jax_key(config.seed, Stream.AUGMENTATION, job, step),
        )
        self._client_batch = config.client_batch or (1 if jax.default_backend() == "cpu" else 16)
        self._evaluate = make_evaluator(
            self.model, functools.partial(augment.plain_inputs, how=how), config.eval_batch
        )
        self._hand_out(self.schedule.initial_jobs)

    @property
    def finished(self) -> bool:
        return self.position == self.schedule.num_arrivals

    @property
    def starts_window(self) -> bool:
        """Whether the next arrival needs a new window of jobs to be trained."""
        return self.position in self._first_of_window

    def arrivals(self) -> Iterator[Receipt]:
        """Processes arrivals one by one until the plan is done."""
        while not self.finished:
            yield self.advance()

    def advance(self) -> Receipt:
        """Processes the next arrival, training its window first when it needs one."""
        index = self.position
        if self.starts_window:
            self._train_window(self._first_of_window[index])
        job = int(self.schedule.job[index])
        receipt = self.server.submit(job, self._uploads.pop(job))
        self._hand_out(int(self.schedule.jobs_started[index]))
        self.position = index + 1
        return receipt

    def evaluate(self, params: Params | None = None, split: str | None = None) -> Evaluation:
        """Evaluates parameters (the newest by default) on a split (the configured by default)."""
        params = self.server.params if params is None else params
        positions = self.dataset.splits[split or self.config.eval_split]
        return self._evaluate(params, self._images, self._labels, positions)

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Everything an exact continuation needs: (plain record, pytree of arrays)."""
        record, arrays = self.server.snapshot()
        uploads = {str(job): upload._asdict() for job, upload in self._uploads.items()}
        record = {**record, "position": self.position, "uploads": sorted(self._uploads)}
        return record, {**arrays, "uploads": uploads}

    def shapes(self, record: dict[str, Any]) -> dict[str, Any]:
        """The structure and shapes of a snapshot's arrays, told from its record."""
        upload = jax.eval_shape(
            lambda: self._train(
                (self.server.params,),
                self._images,
                self._labels,
                jnp.zeros((1, self.config.local_iterations, self.config.batch_size), jnp.int32),
                jnp.zeros(1, jnp.int32),
            )[0]
        )
        uploads = {str(job): upload._asdict() for job in record["uploads"]}
        return {**self.server.shapes(record), "uploads": uploads}

    def restore(self, record: dict[str, Any], params: Params, arrays: dict[str, Any]) -> None:
        """Continues from a snapshot and the parameters of its newest version."""
        self.server.restore(record, params, arrays)
        self._uploads = {int(job): Upload(**upload) for job, upload in arrays["uploads"].items()}
        self.position = record["position"]

    def _hand_out(self, up_to: int) -> None:
        """Dispatches planned jobs until `up_to` are handed out."""
        for client in self.schedule.client[self.server.next_job : up_to]:
            self.server.dispatch(int(client))

    def _train_window(self, window: schedule.Window) -> None:
        """Trains a window's jobs in calls of a fixed size; the last call is padded by repetition.

        Every call is the same compiled program whatever the window, and each job's result depends
        on its own inputs alone.
        """
        limit = self.config.window_limit
        size = min(self._client_batch, limit) if limit else self._client_batch
        for start in range(0, len(window.jobs), size):
            jobs = window.jobs[start : start + size]
            padded = np.resize(jobs, size)
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
                self.server.params_of(int(self.schedule.base_version[job])) for job in padded
            )
            uploads = self._train(
                bases,
                self._images,
                self._labels,
                jnp.asarray(np.stack(indices)),
                jnp.asarray(padded, jnp.int32),
            )
            self._uploads.update(zip(jobs.tolist(), uploads, strict=False))
