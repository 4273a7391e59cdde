"""The record that the rest of the package knows of a model."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

Params = Any  # a pytree of float arrays
# Batch statistics at each tap: ((mean, variance), ...), each of shape [channels of that tap].
Taps = tuple[tuple[jax.Array, jax.Array], ...]


class Model(NamedTuple):
    """A model as pure functions.

    Attributes:
      name: for records.
      input_shape: shape of one input, without the batch axis.
      num_classes: size of the logits.
      init: key -> parameters.
      apply: (parameters, inputs [b, *input_shape]) -> (logits [b, classes], taps). A tap sits after
        every convolution, before the ReLU, and tells the mean and the biased variance of the
        activation over batch and space.
    """

    name: str
    input_shape: tuple[int, ...]
    num_classes: int
    init: Callable[[jax.Array], Params]
    apply: Callable[[Params, jax.Array], tuple[jax.Array, Taps]]


def from_flax(
    name: str, module: nn.Module, input_shape: tuple[int, ...], num_classes: int
) -> Model:
    """Wraps a Flax module whose call returns (logits, taps) and that has only parameters."""

    def init(key):
        return module.init(key, jnp.zeros((1, *input_shape)))["params"]

    def apply(params, inputs):
        return module.apply({"params": params}, inputs)

    return Model(name, tuple(input_shape), num_classes, jax.jit(init), apply)


def parameter_count(tree: Any) -> int:
    """Number of scalars in a pytree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
