"""The first-in first-out pool of samples, and drawing from it by class."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from fedrevive_jax.compute import rows


class Pool(NamedTuple):
    """A ring of labelled samples on the device.

    Attributes:
      samples: pytree of arrays [size, ...], see `rows.padded`. Synthetic: images [size, height,
        width, channels] in [0, 1], or `Embedded` texts; real: byte images or token ids.
      labels: int32 [size]; -1 marks an empty place.
      added: int32 [], samples added so far, less whole rounds of a full pool.
      by_label: int32 [size], the places ordered by their labels, empty ones last. Kept because
        samples are drawn at every arrival and added only now and then.
    """

    samples: Any
    labels: jax.Array
    added: jax.Array
    by_label: jax.Array


def empty(size: int, batch: Any) -> Pool:
    """A pool without samples, with room for `size` of those that a batch (or its shapes) holds."""
    room = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch)
    shapes = jax.eval_shape(rows.padded, room)
    samples = jax.tree.map(lambda leaf: jnp.zeros((size, *leaf.shape[1:]), leaf.dtype), shapes)
    labels = jnp.full(size, -1, jnp.int32)
    return Pool(samples, labels, jnp.zeros((), jnp.int32), _by_label(labels))


def filled(samples: Any, labels: jax.Array) -> Pool:
    """A pool that holds exactly these samples."""
    labels = jnp.asarray(labels, jnp.int32)
    added = jnp.asarray(len(labels), jnp.int32)
    return Pool(rows.padded(jax.tree.map(jnp.asarray, samples)), labels, added, _by_label(labels))


def add(pool: Pool, samples: Any, labels: jax.Array, wanted: jax.Array | bool = True) -> Pool:
    """Adds a batch [b, ...] with labels [b], if it is wanted; the oldest samples make room.

    A batch that is not wanted goes to places that do not exist. So the ring is neither copied, as
    by choosing between two rings, nor read, for which a TPU may lay it out anew.
    """
    chex.assert_tree_shape_prefix(samples, labels.shape)
    chex.assert_rank(labels, 1)
    size = len(pool.labels)
    places = jnp.where(wanted, (pool.added + jnp.arange(len(labels))) % size, size)

    def put(ring, new):
        return ring.at[places].set(new, mode="drop")

    # Kept below 2 * size so that the counter never overflows; only its remainder and whether it is
    # zero matter.
    added = jnp.where(pool.added >= size, pool.added - size, pool.added) + len(labels)
    filled = put(pool.labels, labels)
    return Pool(
        jax.tree.map(put, pool.samples, rows.padded(samples)),
        filled,
        jnp.where(wanted, added, pool.added),
        jax.lax.cond(wanted, _by_label, lambda _: pool.by_label, filled),
    )


def _by_label(labels: jax.Array) -> jax.Array:
    last = jnp.iinfo(labels.dtype).max
    return jnp.argsort(jnp.where(labels < 0, last, labels)).astype(jnp.int32)


def take(pool: Pool, positions: jax.Array, shapes: Any) -> Any:
    """Samples at positions int [n], [n, ...] each.

    Args:
      pool: whose they are.
      positions: places in it.
      shapes: of one sample, see `rows.unpacked`.
    """
    return rows.unpacked(jax.tree.map(lambda leaf: leaf[positions], pool.samples), shapes)


def draw(pool: Pool, mixes: jax.Array, count: int, key: jax.Array) -> jax.Array:
    """Positions of samples whose labels follow given class mixes.

    A label is drawn from the mix restricted to the labels present in the pool, then a sample
    uniformly among those with that label. Where the mix has no mass on any label present, the
    sample is uniform over the whole pool.

    Args:
      pool: not empty.
      mixes: [c, classes], non-negative.
      count: samples for each mix.
      key: a key.

    Returns:
      int32 [c, count].
    """
    chex.assert_rank(mixes, 2)
    num_mixes, num_classes = mixes.shape
    size = len(pool.labels)
    # Empty places, -1, count in a cell of their own, the last one.
    per_label = jnp.zeros(num_classes + 1, jnp.int32).at[pool.labels].add(1)[:num_classes]
    first = jnp.cumsum(per_label) - per_label

    allowed = jnp.where(per_label > 0, mixes, 0)
    mass = allowed.sum(axis=1, keepdims=True)
    # A label drawn in proportion to its count, then uniform within it, is uniform over the pool.
    law = jnp.where(mass > 0, allowed, per_label.astype(mixes.dtype))
    label_key, sample_key = jax.random.split(key)
    labels = jax.random.categorical(label_key, jnp.log(law)[:, None, :], shape=(num_mixes, count))
    offsets = jax.random.randint(sample_key, labels.shape, 0, jnp.maximum(per_label[labels], 1))
    return pool.by_label[jnp.minimum(first[labels] + offsets, size - 1)]
