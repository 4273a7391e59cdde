"""How good a model is on a split: accuracy, loss, accuracy by class."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from fedrevive_jax.compute import devices
from fedrevive_jax.models import Model
from fedrevive_jax.models.model import Params


class Evaluation(NamedTuple):
    """Plain numbers.

    Attributes:
      accuracy: share of samples classified correctly.
      loss: mean softmax cross-entropy.
      per_class: accuracy by class; NaN for a class without samples.
    """

    accuracy: float
    loss: float
    per_class: list[float]


def make_batch_judge(
    model: Model, prepare: Callable[[Any, jax.Array], Any], batch: int, mesh: Mesh | None = None
) -> jax.stages.Wrapped:
    """Compiles one call of an evaluation.

    Args:
      model: the model.
      prepare: (store, positions [b]) -> inputs without augmentation, see `feed`.
      batch: samples of one call.
      mesh: the devices that share a call.

    Returns:
      A jitted function (params, store, labels, positions, valid) -> (sum of losses, right answers
      by class, samples by class), where store and labels are the whole data set, positions int32
      [batch] are places in it, and only those that are valid, bool [batch], count.
    """

    def judge(shared, positions):
        params, store = shared
        return model.apply(params, prepare(store, positions))[0]

    def judge_batch(params, store, labels, positions, valid):
        chex.assert_shape([positions, valid], (batch,))
        logits = devices.split(mesh, judge)((params, store), positions)
        chex.assert_shape(logits, (batch, model.num_classes))
        truth = labels[positions]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, truth)
        right = (logits.argmax(axis=-1) == truth) & valid
        by_class = jax.nn.one_hot(truth, model.num_classes) * valid[:, None]
        return jnp.where(valid, loss, 0.0).sum(), right @ by_class, by_class.sum(axis=0)

    return devices.jit(mesh, judge_batch, model.platform)


def make_evaluator(
    model: Model, prepare: Callable[[Any, jax.Array], Any], batch: int, mesh: Mesh | None = None
) -> Callable[[Params, Any, jax.Array, np.ndarray], Evaluation]:
    """Compiles the evaluation on fixed-size batches; the last one is padded and masked.

    Args:
      model, prepare, batch, mesh: see `make_batch_judge`.

    Returns:
      (params, store, labels, positions) -> `Evaluation`, where positions name the samples of a
      split.
    """
    one_batch = make_batch_judge(model, prepare, batch, mesh)

    def evaluate(params, store, labels, positions) -> Evaluation:
        padded = -(-len(positions) // batch) * batch
        places = np.resize(positions, padded).reshape(-1, batch)
        valid = (np.arange(padded) < len(positions)).reshape(-1, batch)
        parts = [one_batch(params, store, labels, p, v) for p, v in zip(places, valid, strict=True)]
        columns = zip(*jax.device_get(parts), strict=True)
        losses, right, total = (np.sum(column, axis=0, dtype=np.float64) for column in columns)
        per_class = np.divide(right, total, out=np.full_like(total, np.nan), where=total > 0)
        return Evaluation(
            float(right.sum() / total.sum()), float(losses / total.sum()), per_class.tolist()
        )

    return evaluate
