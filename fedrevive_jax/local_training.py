"""What one client does: a few steps of Adam on its own data, from a possibly stale version."""

import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedrevive_jax.messages import Upload
from fedrevive_jax.models import Model
from fedrevive_jax.models.model import Params, Taps

TAP_MOMENTUM = 0.9


class Trained(NamedTuple):
    """Parameters and running statistics after training, and every step's loss [steps]."""

    params: Params
    taps: Taps
    losses: jax.Array


def initial_taps(model: Model) -> Taps:
    """Statistics of a version that has seen no data: mean 0, variance 1."""
    shapes = jax.eval_shape(
        lambda key: model.apply(model.init(key), jnp.zeros((1, *model.input_shape)))[1],
        jax.random.key(0),
    )
    return tuple((jnp.zeros(m.shape, m.dtype), jnp.ones(v.shape, v.dtype)) for m, v in shapes)


def train(
    model: Model,
    params: Params,
    batches,
    batch_of: Callable,
    learning_rate: float,
) -> Trained:
    """Local training of one job.

    Adam with a fresh state (b1 .9, b2 .999, eps 1e-8), softmax cross-entropy, and running tap
    statistics r <- 0.9 r + 0.1 batch, starting from mean 0 and variance 1.

    Args:
      model: the model.
      params: theta_b, the version the job starts from.
      batches: a pytree of arrays with the steps as first axis.
      batch_of: one step's slice of `batches` -> (inputs [b, ...], labels int [b]).
      learning_rate: rate of Adam.
    """
    optimizer = optax.adam(learning_rate)

    def loss_fn(params, inputs, labels):
        logits, taps = model.apply(params, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), taps

    def step(carry, batch):
        params, opt_state, running = carry
        inputs, labels = batch_of(batch)
        (loss, taps), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, inputs, labels)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        running = jax.tree.map(
            lambda old, new: TAP_MOMENTUM * old + (1 - TAP_MOMENTUM) * new, running, taps
        )
        return (params, opt_state, running), loss

    carry = (params, optimizer.init(params), initial_taps(model))
    (params, _, taps), losses = jax.lax.scan(step, carry, batches)
    return Trained(params, taps, losses)


def make_window_trainer(
    model: Model,
    prepare: Callable[[jax.Array, jax.Array], jax.Array],
    learning_rate: float,
    seed_key: Callable[[jax.Array, jax.Array], jax.Array],
) -> Callable:
    """Compiles the training of a fixed number of jobs at once, each from its own version.

    Args:
      model: the model.
      prepare: (byte images [b, ...], key) -> inputs, the clients' augmentation.
      learning_rate: rate of Adam.
      seed_key: (job, step) -> key of that step's augmentation; both traced integers.

    Returns:
      A jitted function (bases, images, labels, indices, jobs) -> tuple of `Upload`s, where `bases`
      is a tuple of parameter pytrees, one for each job, `images` and `labels` are the whole data
      set, `indices` int32 [jobs, steps, batch] are positions in it, and `jobs` int32 [jobs]. It is
      traced once for each number of jobs.
    """

    def one_job(base, images, labels, indices, job):
        def batch_of(step):
            number, positions = step
            return prepare(images[positions], seed_key(job, number)), labels[positions]

        steps = (jnp.arange(len(indices)), indices)
        trained = train(model, base, steps, batch_of, learning_rate)
        return Upload(trained.params, trained.taps, trained.losses.mean())

    @jax.jit
    def train_jobs(bases, images, labels, indices, jobs):
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *bases)
        uploads = jax.vmap(one_job, (0, None, None, 0, 0))(stacked, images, labels, indices, jobs)
        return tuple(jax.tree.map(operator.itemgetter(i), uploads) for i in range(len(bases)))

    return train_jobs
