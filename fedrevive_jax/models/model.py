"""The record that the rest of the package knows of a model."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedrevive_jax.models.layers import batch_statistics

Params = Any  # a pytree of float arrays
# Statistics at each tap: ((mean, variance), ...), each of shape [channels of that tap].
Taps = tuple[tuple[jax.Array, jax.Array], ...]


class Tokens(NamedTuple):
    """Text as a model's input: ids int [b, length], 0 is padding; the table [V, d] they index."""

    ids: jax.Array
    table: jax.Array


class Embedded(NamedTuple):
    """Text as a model's input: embeddings float [b, length, d], mask bool [b, length]."""

    embeddings: jax.Array
    mask: jax.Array


class Vocabulary(NamedTuple):
    """What a text model reads: ids below `size`, embeddings of `width` numbers."""

    size: int
    width: int


class Model(NamedTuple):
    """A model as pure functions.

    Attributes:
      name: for records.
      input_shape: shape of one input, without the batch axis: (height, width, channels) of an image
        or (length,) of a text.
      num_classes: size of the logits.
      init: key -> parameters.
      apply: (parameters, inputs, key or None) -> (logits [b, classes], activations), where inputs
        are images [b, *input_shape], `Tokens` or `Embedded`, and the activations [b, ..., channels]
        are those at the taps: after every convolution before the ReLU, or after every layer of an
        encoder. A key turns dropout on, where the model has any.
      frozen: key -> arrays that the model needs and nobody trains (a token table, for `Tokens`).
        They are shared, never sent and not part of a version.
      vocabulary: for a text model; None for a model of images.
    """

    name: str
    input_shape: tuple[int, ...]
    num_classes: int
    init: Callable[[jax.Array], Params]
    apply: Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]]
    frozen: Callable[[jax.Array], Any] = lambda key: ()
    vocabulary: Vocabulary | None = None


def from_flax(
    name: str, module: nn.Module, input_shape: tuple[int, ...], num_classes: int
) -> Model:
    """Wraps a Flax module for images that returns (logits, activations) and has only parameters."""

    def init(key):
        return module.init(key, jnp.zeros((1, *input_shape)))["params"]

    def apply(params, inputs, key=None):
        del key
        return module.apply({"params": params}, inputs)

    return Model(name, tuple(input_shape), num_classes, jax.jit(init), apply)


def as_inputs(samples: Any, frozen: Any) -> Any:
    """Samples as inputs of a model: token ids [b, length] are given the frozen table beside them;
    images and embedded texts are inputs already.
    """
    is_ids = isinstance(samples, jax.Array) and jnp.issubdtype(samples.dtype, jnp.signedinteger)
    return Tokens(samples, frozen) if is_ids else samples


def tap_statistics(activations: tuple[jax.Array, ...]) -> Taps:
    """Mean and biased variance per channel at every tap, over all other axes."""
    return tuple(batch_statistics(activation) for activation in activations)


def gaussian_inputs(model: Model, key: jax.Array, count: int) -> Any:
    """Standard normal images [count, ...], or unmasked standard normal embeddings."""
    if model.vocabulary is None:
        return jax.random.normal(key, (count, *model.input_shape))
    shape = (count, *model.input_shape)
    embeddings = jax.random.normal(key, (*shape, model.vocabulary.width))
    return Embedded(embeddings, jnp.ones(shape, bool))


def parameter_count(tree: Any) -> int:
    """Number of scalars in a pytree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
