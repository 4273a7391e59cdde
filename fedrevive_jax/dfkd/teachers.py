"""The most recent uploads, which teach."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedrevive_jax.messages import Upload
from fedrevive_jax.models.model import Params, Taps


class Teachers(NamedTuple):
    """A ring of the c most recent uploads.

    The order within the ring carries no meaning: all sums over teachers are symmetric.

    Attributes:
      params: pytree, leaves [c, ...].
      taps: feature statistics, leaves [c, channels].
      clients: int32 [c], who sent the upload; -1 marks a free place.
      added: int32 [], place of the next upload.
    """

    params: Params
    taps: Taps
    clients: jax.Array
    added: jax.Array


def init(params: Params, taps: Taps, capacity: int) -> Teachers:
    """A ring without teachers, shaped after one upload's parameters and statistics."""

    def room(leaf):
        return jnp.zeros((capacity, *leaf.shape), leaf.dtype)

    return Teachers(
        jax.tree.map(room, params),
        jax.tree.map(room, taps),
        jnp.full(capacity, -1, jnp.int32),
        jnp.zeros((), jnp.int32),
    )


def insert(
    teachers: Teachers, upload: Upload, client: jax.Array, wanted: jax.Array | bool = True
) -> Teachers:
    """Replaces the oldest teacher by an upload, if it is wanted."""
    place = teachers.added

    def put(ring, leaf):
        return ring.at[place].set(jnp.where(wanted, leaf, ring[place]))

    return Teachers(
        jax.tree.map(put, teachers.params, upload.params),
        jax.tree.map(put, teachers.taps, upload.taps),
        put(teachers.clients, client),
        jnp.where(wanted, (place + 1) % len(teachers.clients), place),
    )
