"""The T5 encoder as a classifier of text (Raffel et al., 2020), with a frozen token table.

The classifier token is put in front of every text, and its final state is what the head reads:
dropout, dense, tanh, dropout, dense. Attention is not scaled, normalisation is by the root mean
square and before each block, and the first layer's relative position biases serve all layers.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fedrevive_jax.data.tokens import PADDING
from fedrevive_jax.models import layers
from fedrevive_jax.models.model import Embedded, Model, Params, Text, Vocabulary, dense_head

HEAD_DROPOUT = 0.1


class T5Shape(NamedTuple):
    """Sizes of an encoder, named as in the field; the defaults are those of T5-small.

    Attributes:
      vocabulary: rows of the token table.
      width: d_model.
      feed_forward: d_ff.
      layers, heads: how many.
      head_width: d_kv.
      buckets, max_distance: of the relative positions.
      epsilon: of the normalisation.
      classifier_token: the token in front of every text.
    """

    vocabulary: int = 32_128
    width: int = 512
    feed_forward: int = 2048
    layers: int = 6
    heads: int = 8
    head_width: int = 64
    buckets: int = 32
    max_distance: int = 128
    epsilon: float = 1e-6
    classifier_token: int = 3200


def position_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of every (query, key) pair of positions, int [length, length].

    Half of the buckets are for keys to the right. Of each half, one half is for the exact distances
    and the other for distances on a logarithmic scale, up to `max_distance`.
    """
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = buckets // 2
    exact = half // 2
    far = np.maximum(np.abs(distance), exact)
    scale = (half - exact) / math.log(max_distance / exact)
    # Distances on a boundary (64 of 128) must not fall below it by rounding.
    logarithmic = exact + (np.log(far / exact) * scale + 1e-6).astype(int)
    within = np.where(np.abs(distance) < exact, np.abs(distance), np.minimum(logarithmic, half - 1))
    return within + half * (distance > 0)


class RMSNorm(nn.Module):
    """Divides by the root mean square over the last axis; a learned scale, no shift."""

    epsilon: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        # In single precision whatever the states are in.
        wide = layers.single(x)
        mean_square = (wide**2).mean(axis=-1, keepdims=True)
        normalised = wide * jax.lax.rsqrt(mean_square + self.epsilon)
        return (normalised * layers.single(scale)[None, None]).astype(x.dtype)


def _projection(features: int, deviation: float, name: str) -> nn.Dense:
    init = nn.initializers.normal(deviation)
    return nn.Dense(features, use_bias=False, kernel_init=init, name=name)


class EncoderLayer(nn.Module):
    """Self-attention, then a feed-forward block with ReLU, each on normalised states and added."""

    shape: T5Shape

    @nn.compact
    def __call__(self, states, bias):
        shape = self.shape
        batch, length, width = states.shape
        inner = shape.heads * shape.head_width

        x = RMSNorm(shape.epsilon, name="attention_norm")(states)
        # T5's start makes up for the missing 1 / sqrt(d_kv) in the queries.
        query = _projection(inner, (width * shape.head_width) ** -0.5, "query")(x)
        key = _projection(inner, width**-0.5, "key")(x)
        value = _projection(inner, width**-0.5, "value")(x)
        query, key, value = (
            v.reshape(batch, length, shape.heads, shape.head_width) for v in (query, key, value)
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=bias.dtype)
        weights = jax.nn.softmax(scores + bias).astype(value.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        mixed = mixed.reshape(batch, length, inner)
        states = states + _projection(width, inner**-0.5, "output")(mixed)

        x = RMSNorm(shape.epsilon, name="feed_forward_norm")(states)
        x = nn.relu(_projection(shape.feed_forward, width**-0.5, "feed_forward_in")(x))
        return states + _projection(width, shape.feed_forward**-0.5, "feed_forward_out")(x)


class T5Classifier(nn.Module):
    """(`Text`, key or None) -> (logits, each layer's state at position 0, [b, width])."""

    shape: T5Shape
    num_classes: int

    @nn.compact
    def __call__(self, text: Text, key=None):
        shape = self.shape
        states, mask = _states_and_mask(text, shape.classifier_token)
        length = states.shape[1]
        deviation = nn.initializers.normal(shape.width**-0.5)
        table = self.param("relative_bias", deviation, (shape.buckets, shape.heads))
        buckets = position_buckets(length, shape.buckets, shape.max_distance)
        states = states.astype(table.dtype)
        # Weights of attention are in single precision whatever the states are in.
        bias = layers.single(table)[buckets].transpose(2, 0, 1)[None]
        lowest = jnp.finfo(bias.dtype).min
        bias = bias + jnp.where(mask, 0, lowest)[:, None, None, :]
        taps = []
        for i in range(shape.layers):
            states = EncoderLayer(shape, name=f"layer{i}")(states, bias)
            taps.append(states[:, 0])
        x = RMSNorm(shape.epsilon, name="final_norm")(states)[:, 0]
        keys = (None, None) if key is None else jax.random.split(key)
        x = jnp.tanh(layers.dense(shape.width, _dropout(x, keys[0]), "head1"))
        return layers.dense(self.num_classes, _dropout(x, keys[1]), "head2"), tuple(taps)


def _states_and_mask(text: Text, classifier_token: int):
    """Embeddings [b, 1 + length, width] with the classifier token in front, and their mask."""
    if isinstance(text.content, Embedded):
        embeddings, mask = text.content
    else:
        embeddings, mask = text.table[text.content], text.content != PADDING
    first = jnp.broadcast_to(text.table[classifier_token], (len(mask), 1, text.table.shape[1]))
    return (
        jnp.concatenate([first.astype(embeddings.dtype), embeddings], axis=1),
        jnp.concatenate([jnp.ones_like(mask[:, :1]), mask], axis=1),
    )


def _dropout(x, key):
    if key is None:
        return x
    keep = jax.random.bernoulli(key, 1 - HEAD_DROPOUT, x.shape)
    return jnp.where(keep, x / (1 - HEAD_DROPOUT), 0)


def make_classifier(
    shape: T5Shape,
    length: int,
    num_classes: int,
    weights: tuple[Params, jax.Array] | None = None,
    platform: str | None = None,
) -> Model:
    """The classifier as a `Model`.

    Args:
      shape: sizes of the encoder.
      length: token positions of a text, without the classifier token.
      num_classes: size of the logits.
      weights: encoder parameters and token table to start from, see `t5_weights.read`; otherwise
        T5's own random start, with a standard normal table.
      platform: see `from_flax`.
    """
    module = T5Classifier(shape, num_classes)

    def init(key):
        ids = jnp.zeros((1, length), jnp.int32)
        text = Text(ids, jnp.zeros((shape.vocabulary, shape.width)))
        params = module.init(key, text)["params"]
        return params if weights is None else {**params, **weights[0]}

    def frozen(key):
        if weights is not None:
            return weights[1]
        # The key of the parameters' start is the argument; the table takes a key of its own.
        return jax.random.normal(jax.random.fold_in(key, 1), (shape.vocabulary, shape.width))

    def apply(params, inputs, key=None) -> Any:
        return module.apply({"params": params}, inputs, key)

    return Model(
        "t5",
        (length,),
        num_classes,
        jax.jit(init),
        apply,
        frozen,
        Vocabulary(shape.vocabulary, shape.width),
        platform or jax.default_backend(),
        dense_head("head2"),
    )
