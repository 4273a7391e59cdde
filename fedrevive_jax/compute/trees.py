"""Small operations on whole pytrees that optax and jax.tree do not have."""

from typing import Any

import jax
import jax.numpy as jnp


def all_finite(tree: Any) -> jax.Array:
    """Whether every number in a pytree of float arrays is finite, bool []."""
    flags = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
    return jnp.stack(flags).all() if flags else jnp.asarray(True)


def select(condition: jax.Array, if_true: Any, if_false: Any) -> Any:
    """One of two pytrees of equal structure; never mixes, so NaNs of the other do not leak."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), if_true, if_false)


def scale(factor: jax.Array, tree: Any) -> Any:
    """Every leaf times one number, in the leaf's own dtype."""
    return jax.tree.map(lambda leaf: jnp.asarray(factor, leaf.dtype) * leaf, tree)


def nbytes(tree: Any) -> int:
    """Size of all arrays, or of what `jax.eval_shape` tells of them."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
