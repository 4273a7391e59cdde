"""Synthesis of text: learned prompt vectors in front of optimised text embeddings."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedrevive_jax.dfkd.maker import Maker
from fedrevive_jax.models.model import Embedded, Taps, Vocabulary

PROMPTS = 4


class SeedText(NamedTuple):
    """Labelled texts that synthesis starts from: ids int32 [n, length], labels int32 [n]."""

    ids: jax.Array
    labels: jax.Array


def prompt_maker(vocabulary: Vocabulary, length: int, seed: SeedText | None = None) -> Maker:
    """Embedded texts of `length` positions from 4 prompt vectors and per-sample embeddings.

    The prompts are what the meta-step learns. The embeddings start from those of a seed text with
    the label asked for, or of random tokens where there is none. A sample's mask covers the prompts
    and U{length/2..length} positions, cut to `length`. Samples are judged one by one, see
    `tap_distance`.

    Args:
      vocabulary: of the model.
      length: positions of a text; more than the prompts take.
      seed: labelled texts in the model's tokens.
    """
    own = length - PROMPTS

    def init(key):
        return jax.random.normal(key, (PROMPTS, vocabulary.width))

    def draw(text_key, mask_key, targets, table):
        count = len(targets)
        random_key, seed_key = jax.random.split(text_key)
        ids = jax.random.randint(random_key, (count, own), 0, vocabulary.size)
        if seed is not None:
            fits = seed.labels[None, :] == targets[:, None]
            chosen = jax.random.categorical(seed_key, jnp.where(fits, 0.0, -jnp.inf))
            ids = jnp.where(fits.any(axis=1, keepdims=True), seed.ids[chosen, :own], ids)
        covered = PROMPTS + jax.random.randint(mask_key, (count,), length // 2, length + 1)
        return table[ids], jnp.arange(length)[None, :] < covered[:, None]

    def make(prompts, embeddings, mask):
        front = jnp.broadcast_to(prompts[None], (len(embeddings), *prompts.shape))
        return Embedded(jnp.concatenate([front, embeddings], axis=1), mask)

    return Maker(init, draw, make, tap_distance)


def tap_distance(states: tuple[jax.Array, ...], reference: Taps) -> jax.Array:
    """How far samples are from a client's mean states, at two of the layers.

    (1 / layers) sum over the middle and the last layer (taps 2 and 5 of six, counted from zero) of
    the mean over samples of ||state(x_i) - mu||_2. The gradient of a norm at zero is zero.
    Without taps the distance is zero.
    """
    layers = len(states)
    if not layers:
        return jnp.zeros(())
    total = 0.0
    for tap in (layers // 2 - 1, layers - 1):
        mean, _ = reference[tap]
        total += optax.safe_norm(states[tap] - mean[None], 0.0, axis=-1).mean()
    return total / layers
