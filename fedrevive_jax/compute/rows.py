"""Samples as rows that a device can fetch one by one.

A TPU keeps arrays in tiles of 128 numbers. Images [n, height, width, channels] have few channels,
so that its compiler lays a whole store out anew before it gathers from it, in every call: 737 MB
for CIFAR, more than half of an evaluation call on a v5e. As rows [n, numbers] of whole tiles
nothing is moved. Embedded texts [n, positions, width] whose width fills tiles stay as they are: as
rows of 65,536 numbers they would be laid out anew. Rows that do not fill their tiles, such as those
of 28x28 images, are worse than images where they are only read; where they are written, too, they
are better with zeros behind.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

TILE = 128
# The most that zeros may add to a row.
PADDING = 0.25


def packed(samples: Any) -> Any:
    """Arrays [n, ...] of NumPy or JAX, as rows [n, numbers] where these fill whole tiles and their
    last axis does not."""

    def pack(leaf):
        numbers = math.prod(leaf.shape[1:])
        whole = leaf.ndim > 2 and numbers > 0 and numbers % TILE == 0 and leaf.shape[-1] % TILE > 0
        return leaf.reshape(len(leaf), numbers) if whole else leaf

    return jax.tree.map(pack, samples)


def padded(samples: Any) -> Any:
    """Arrays of JAX, `packed`, with zeros behind those rows that nearly fill whole tiles."""

    def pad(leaf):
        numbers = math.prod(leaf.shape[1:])
        missing = -numbers % TILE
        if leaf.ndim <= 2 or not missing or missing > PADDING * numbers:
            return leaf
        return jnp.pad(leaf.reshape(len(leaf), numbers), ((0, 0), (0, missing)))

    return packed(jax.tree.map(pad, samples))


def unpacked(rows: Any, shapes: Any) -> Any:
    """Rows, padded or not, or samples that are none, in their shapes again.

    Args:
      rows: what was packed, or some of it, with any leading axes instead of n.
      shapes: the structure of a sample; leaves have the `shape` of one, without n.
    """

    def unpack(leaf, one):
        if leaf.shape[leaf.ndim - len(one.shape) :] == one.shape:
            return leaf
        return leaf[..., : math.prod(one.shape)].reshape(*leaf.shape[:-1], *one.shape)

    return jax.tree.map(unpack, rows, shapes)
