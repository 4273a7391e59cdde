"""FedFa: the model is the mean of the most recent client models (arXiv 2404.11015).

    the arriving theta' replaces the oldest of a queue of k,   theta <- mean of the queue,

which is a server rate of 1; another rate goes part of that way. The queue starts with k copies of
the initial model, so that the first versions are not single clients' models.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedrevive_jax.config import Config
from fedrevive_jax.messages import Submission
from fedrevive_jax.methods.method import (
    Aggregation,
    Ingredients,
    Method,
    as_it_is,
    compose,
    server_optimizer,
)
from fedrevive_jax.models.model import Params


class Queue(NamedTuple):
    """A ring of models, leaves [k, ...], and the place of the oldest, int32 []."""

    models: Params
    oldest: jax.Array


def recent_models(length: int) -> Aggregation:
    """The way from the global model to the mean of the queue."""

    def init(params):
        copies = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (length, *leaf.shape)), params)
        return Queue(copies, jnp.zeros((), jnp.int32))

    def take(queue, entry, delta, submission: Submission):
        models = jax.tree.map(
            lambda ring, leaf: ring.at[queue.oldest].set(leaf),
            queue.models,
            submission.upload.params,
        )
        return Queue(models, (queue.oldest + 1) % length), entry

    def direction(queue, taken, params):
        return jax.tree.map(
            lambda ring, leaf: ring.mean(axis=0) - leaf, queue.models, params
        ), queue

    return Aggregation(init, take, direction)


def create(config: Config, ingredients: Ingredients) -> Method:
    del ingredients
    return compose(
        as_it_is(), config.buffer_size, server_optimizer(config), recent_models(config.fedfa_queue)
    )
