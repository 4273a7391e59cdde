"""The first-in first-out pool of images, and drawing from it by class."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Pool(NamedTuple):
    """A ring of labelled images on the device.

    Attributes:
      images: [size, height, width, channels]; float32 in [0, 1] (synthetic) or uint8 (real).
      labels: int32 [size]; -1 marks an empty place.
      added: int32 [], images added so far.
    """

    images: jax.Array
    labels: jax.Array
    added: jax.Array


def empty(size: int, image_shape: tuple[int, ...]) -> Pool:
    return Pool(
        jnp.zeros((size, *image_shape)), jnp.full(size, -1, jnp.int32), jnp.zeros((), jnp.int32)
    )


def filled(images: jax.Array, labels: jax.Array) -> Pool:
    """A pool that holds exactly these images."""
    labels = jnp.asarray(labels, jnp.int32)
    return Pool(jnp.asarray(images), labels, jnp.asarray(len(labels), jnp.int32))


def add(pool: Pool, images: jax.Array, labels: jax.Array) -> Pool:
    """Adds a batch [b, ...] with labels [b]; the oldest images make room."""
    size = len(pool.labels)
    places = (pool.added + jnp.arange(len(labels))) % size
    return Pool(
        pool.images.at[places].set(images),
        pool.labels.at[places].set(labels),
        # Kept below 2 * size so that the counter never overflows; only its remainder and
        # whether it is zero matter.
        jnp.where(pool.added >= size, pool.added - size, pool.added) + len(labels),
    )


def draw(pool: Pool, mixes: jax.Array, count: int, key: jax.Array) -> jax.Array:
    """Positions of images whose labels follow given class mixes.

    A label is drawn from the mix restricted to the labels present in the pool, then an image
    uniformly among those with that label. Where the mix has no mass on any label present, the
    image is uniform over the whole pool.

    Args:
      pool: not empty.
      mixes: [c, classes], non-negative.
      count: images for each mix.
      key: a key.

    Returns:
      int32 [c, count].
    """
    num_mixes, num_classes = mixes.shape
    size = len(pool.labels)
    # Empty places sort behind all labels.
    sortable = jnp.where(pool.labels < 0, num_classes, pool.labels)
    by_label = jnp.argsort(sortable)
    per_label = jnp.zeros(num_classes + 1, jnp.int32).at[sortable].add(1)[:num_classes]
    first = jnp.cumsum(per_label) - per_label

    allowed = jnp.where(per_label > 0, mixes, 0)
    mass = allowed.sum(axis=1, keepdims=True)
    # A label drawn in proportion to its count, then uniform within it, is uniform over the pool.
    law = jnp.where(mass > 0, allowed, per_label.astype(mixes.dtype))
    label_key, image_key = jax.random.split(key)
    labels = jax.random.categorical(label_key, jnp.log(law)[:, None, :], shape=(num_mixes, count))
    offsets = jax.random.randint(image_key, labels.shape, 0, jnp.maximum(per_label[labels], 1))
    return by_label[jnp.minimum(first[labels] + offsets, size - 1)]
