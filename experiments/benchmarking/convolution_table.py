"""The ways to compute a model's convolutions, timed in the uses that a run has for them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarking.measuring import time_calls
from fedrevive_jax import models
from fedrevive_jax.clients.local_training import train
from fedrevive_jax.compute import devices
from fedrevive_jax.config import Config
from fedrevive_jax.data import Dataset
from fedrevive_jax.dfkd.distillation import teacher_logits
from fedrevive_jax.models import convolutions

STEPS = 2
JOBS = 4


def measure(config: Config, dataset: Dataset, repeats: int, say: Callable) -> list[dict[str, Any]]:
    """Milliseconds by way: a training step of one client, of one of several clients that are looped
    over or mapped together, and what one teacher says to all samples of a distillation.

    Args:
      config: names the model, its width, batch sizes and precision.
      dataset: gives the shapes.
      repeats: calls of each.
      say: called with a line about what comes next.
    """
    jobs = max(config.client_batch, JOBS)
    rng = np.random.default_rng(config.seed)
    shape = (jobs, STEPS, config.batch_size)
    images = jnp.asarray(rng.random((*shape, *dataset.input_shape), np.float32))
    labels = jnp.asarray(rng.integers(0, dataset.num_classes, shape, np.int32))
    drawn = (config.distillation_steps, 1, config.distillation_batch, *dataset.input_shape)
    pool = jnp.asarray(rng.random(drawn, np.float32))
    rows = []
    for way in convolutions.WAYS:
        say(f"convolution {way}")
        chosen = dataclasses.replace(config, convolution=way)
        model = models.create(chosen, dataset.input_shape, dataset.num_classes)
        model = models.with_precision(model, config.precision)
        params = model.init(jax.random.key(config.seed))
        ring = jax.tree.map(lambda leaf: leaf[None], params)
        several = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], jobs, axis=0), params)

        def one_job(job, model=model):
            params, images, labels = job
            steps = (images, labels)
            return train(model, params, steps, lambda s: (*s, None), config.client_lr).params

        everything = (several, images, labels)
        first = jax.tree.map(lambda leaf: leaf[0], everything)
        uses = {
            "one client": (one_job, first, STEPS),
            "loop over clients": (lambda all_, f=one_job: jax.lax.map(f, all_), everything, 0),
            "vmap over clients": (lambda all_, f=one_job: jax.vmap(f)(all_), everything, 0),
            "teacher": (lambda pair, m=model: teacher_logits(m, *pair), (ring, pool), 1),
        }
        row: dict[str, Any] = {"convolution": way}
        for use, (function, arguments, parts) in uses.items():
            compiled = devices.jit(None, function)
            seconds = time_calls(lambda f=compiled, a=arguments: f(a), repeats).median
            row[use] = 1e3 * seconds / (parts or jobs * STEPS)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown; milliseconds."""
    cells = [list(rows[0]), ["---"] * len(rows[0])]
    cells += [[v if isinstance(v, str) else f"{v:.4g}" for v in row.values()] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells) + "\n"
