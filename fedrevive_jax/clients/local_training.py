"""What one client does: a few steps of Adam on its own data, from a possibly stale version."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from fedrevive_jax.compute import devices
from fedrevive_jax.messages import ClientPart, Download, Upload
from fedrevive_jax.models import Model
from fedrevive_jax.models.model import Params, Taps, initial_taps, tap_statistics

TAP_MOMENTUM = 0.9
# Folded into a step's key; apart from the tags of `data.augment`.
DROPOUT, TERM = 3, 4
NOTHING = ClientPart()


class Trained(NamedTuple):
    """Parameters and running statistics after training, and every step's loss [steps]."""

    params: Params
    taps: Taps
    losses: jax.Array


def train(
    model: Model,
    params: Params,
    batches,
    batch_of: Callable,
    learning_rate: float,
    term: Callable | None = None,
) -> Trained:
    """Local training of one job.

    Adam with a fresh state (b1 .9, b2 .999, eps 1e-8), softmax cross-entropy, and running tap
    statistics r <- 0.9 r + 0.1 batch, starting from mean 0 and variance 1.

    Args:
      model: the model.
      params: theta_b, the version the job starts from.
      batches: a pytree of arrays with the steps as first axis.
      batch_of: one step's slice of `batches` -> (inputs [b, ...], labels int [b], key or None),
        the key for dropout.
      learning_rate: rate of Adam.
      term: (params, logits [b, classes], labels, batch) -> float32 [], added to the loss that is
        descended; the losses that are told are without it.
    """
    optimizer = optax.adam(learning_rate)

    def loss_fn(params, batch):
        inputs, labels, key = batch_of(batch)
        logits, activations = model.apply(params, inputs, key)
        chex.assert_shape(logits, (*labels.shape, model.num_classes))
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        whole = loss if term is None else loss + term(params, logits, labels, batch)
        return whole, (loss, tap_statistics(activations))

    def step(carry, batch):
        params, opt_state, running = carry
        grads, (loss, taps) = jax.grad(loss_fn, has_aux=True)(params, batch)
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
    prepare: Callable[[Any, jax.Array, jax.Array], Any],
    learning_rate: float,
    seed_key: Callable[[jax.Array, jax.Array], jax.Array],
    mesh: Mesh | None = None,
    part: ClientPart = NOTHING,
) -> jax.stages.Wrapped:
    """Compiles the training of a fixed number of jobs at once, each from its own version.

    Args:
      model: the model.
      prepare: (store, positions [b], key) -> inputs with the clients' augmentation, see `feed`.
      learning_rate: rate of Adam.
      seed_key: (job, step) -> key of that step's augmentation and dropout; both traced integers.
      mesh: the devices that share the jobs.
      part: what the method has the clients do beside.

    Returns:
      A jitted function (bases, store, labels, indices, jobs) -> tuple of `Upload`s, where `bases`
      is a tuple of `Download`s, one for each job, `store` and `labels` are the whole data
      set, `indices` int32 [jobs, steps, batch] are positions in it, and `jobs` int32 [jobs]. It is
      traced once for each number of jobs.
    """

    def one_job(base: Download, store, labels, indices, job):
        def batch_of(step):
            number, positions = step
            key = seed_key(job, number)
            return (
                prepare(store, positions, key),
                labels[positions],
                jax.random.fold_in(key, DROPOUT),
            )

        def term(params, logits, own, step):
            assert part.term is not None
            number, _ = step
            key = jax.random.fold_in(seed_key(job, number), TERM)
            return part.term(params, logits, own, base.extra, number, key)

        steps = (jnp.arange(len(indices)), indices)
        added = None if part.term is None else term
        trained = train(model, base.params, steps, batch_of, learning_rate, added)
        extra = part.report(labels[indices])
        return Upload(trained.params, trained.taps, trained.losses.mean(), extra)

    def several_jobs(data, jobs):
        return jax.vmap(lambda base, *job: one_job(base, *data, *job))(*jobs)

    def train_jobs(bases, store, labels, indices, jobs):
        chex.assert_rank([labels, indices, jobs], [1, 3, 1])
        chex.assert_equal(len(bases), len(jobs))
        chex.assert_equal_shape_prefix([indices, jobs], 1)
        chex.assert_trees_all_equal_shapes_and_dtypes(bases[0], *bases)  # also of a single one
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *bases)
        train_all = devices.split(mesh, several_jobs)
        uploads = train_all((store, labels), (stacked, indices, jobs))
        return tuple(jax.tree.map(operator.itemgetter(i), uploads) for i in range(len(bases)))

    return devices.jit(mesh, train_jobs, model.platform)
