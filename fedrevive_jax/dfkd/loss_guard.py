"""Keeps a spiking or broken loss term from moving anything."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedrevive_jax import trees

TERMS = ("feature", "one_hot", "adversarial", "distillation")
KEPT = 20
NEEDED = 10
SPIKE = 3.0


class LossGuard(NamedTuple):
    """The last kept values of every loss term, in the order of `TERMS`.

    Attributes:
      values: float32 [4, 20], a ring of magnitudes.
      counts: int32 [4], values kept so far.
    """

    values: jax.Array
    counts: jax.Array


def init() -> LossGuard:
    return LossGuard(jnp.zeros((len(TERMS), KEPT)), jnp.zeros(len(TERMS), jnp.int32))


def check(guard: LossGuard, term: str, value: jax.Array) -> tuple[jax.Array, LossGuard]:
    """Whether a loss term may count in this step, and the guard after it.

    A value that is not finite, or more than 3 times the mean of at least 10 kept values, does not
    count and is not kept. The adversarial term is never positive, so magnitudes are compared;
    for the other terms that is the value itself.

    Args:
      guard: the state.
      term: one of `TERMS`.
      value: the loss, [].

    Returns:
      (bool [], the new guard).
    """
    row = TERMS.index(term)
    magnitude = jnp.abs(jax.lax.stop_gradient(value)).astype(guard.values.dtype)
    count = guard.counts[row]
    filled = jnp.minimum(count, KEPT)
    mean = guard.values[row].sum() / jnp.maximum(filled, 1)
    spike = (filled >= NEEDED) & (magnitude > SPIKE * mean)
    counts = jnp.isfinite(magnitude) & ~spike
    kept = LossGuard(guard.values.at[row, count % KEPT].set(magnitude), guard.counts.at[row].add(1))
    return counts, trees.select(counts, kept, guard)
