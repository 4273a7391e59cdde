"""Samples as rows of whole tiles, and back."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrevive_jax.compute import rows
from fedrevive_jax.dfkd import pool
from fedrevive_jax.models.model import Embedded


@pytest.mark.parametrize(
    ("shape", "packed"),
    [
        ((5, 32, 32, 3), (5, 3072)),
        ((5, 28, 28, 1), (5, 28, 28, 1)),  # 784 numbers end within a tile
        ((5, 128), (5, 128)),
        ((5, 16, 8), (5, 128)),
        ((0, 8, 16), (0, 128)),
        ((5, 4, 256), (5, 4, 256)),  # fill tiles as they are
    ],
)
def test_what_fills_its_tiles_becomes_rows(shape, packed):
    samples = np.arange(np.prod(shape)).reshape(shape)
    stored = rows.packed(samples)
    assert stored.shape == packed
    one = jax.ShapeDtypeStruct(shape[1:], samples.dtype)
    np.testing.assert_array_equal(rows.unpacked(stored, one), samples)
    places = np.asarray([[1, 0], [0, 2]])[:, : len(samples)]
    np.testing.assert_array_equal(rows.unpacked(stored[places], one), samples[places])


@pytest.mark.parametrize(
    ("shape", "stored"),
    [
        ((5, 28, 28, 1), (5, 896)),
        ((5, 8, 8, 1), (5, 8, 8, 1)),  # would be twice as large
        ((5, 32, 32, 3), (5, 3072)),
        ((5, 120), (5, 120)),
    ],
)
def test_what_nearly_fills_its_tiles_gets_zeros_behind(shape, stored):
    samples = jnp.arange(math.prod(shape), dtype=jnp.float32).reshape(shape)
    rows_of = rows.padded(samples)
    assert rows_of.shape == stored
    assert rows_of.sum() == samples.sum()
    one = jax.ShapeDtypeStruct(shape[1:], samples.dtype)
    np.testing.assert_array_equal(rows.unpacked(rows_of[None, 1:], one)[0], samples[1:])


def test_a_pool_gives_back_what_it_was_given():
    """Images of whole tiles, and texts of which the mask is packed with the embeddings or not."""
    key = jax.random.key(0)
    for samples in (
        jax.random.normal(key, (4, 16, 16, 1)),
        jax.random.normal(key, (4, 15, 15, 1)),
        Embedded(jax.random.normal(key, (4, 16, 8)), jnp.ones((4, 16), bool)),
        Embedded(jax.random.normal(key, (4, 2, 128)), jnp.ones((4, 2), bool)),
    ):
        one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), samples)
        ring = pool.add(pool.empty(6, samples), samples, jnp.arange(4))
        taken = pool.take(ring, jnp.asarray([3, 0]), one)
        for leaf, given in zip(jax.tree.leaves(taken), jax.tree.leaves(samples), strict=True):
            np.testing.assert_array_equal(leaf, given[np.asarray([3, 0])])
