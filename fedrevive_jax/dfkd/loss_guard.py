"""Keeps a spiking or broken loss term from moving anything."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedrevive_jax.compute import trees

TERMS = ("feature", "one_hot", "adversarial", "distillation")
KEPT = 20
NEEDED = 10
SPIKE = 3.0


class LossGuard(NamedTuple):
    """The last kept values of every loss term, in the order of `TERMS`.

    Attributes:
      values: float32 [4, 20], a ring.
      counts: int32 [4], values kept so far.
    """

    values: jax.Array
    counts: jax.Array


def init() -> LossGuard:
    return LossGuard(jnp.zeros((len(TERMS), KEPT)), jnp.zeros(len(TERMS), jnp.int32))


def check(
    guard: LossGuard, term: str, value: jax.Array, form: str = "published"
) -> tuple[jax.Array, LossGuard]:
    """Whether a loss term may count in this step, and the guard after it.

    A value that is not finite, or more than 3 times the positive mean of at least 10 kept values,
    does not count. The adversarial term is never positive: of it only what is not finite does not
    count.

    Args:
      guard: the state.
      term: one of `TERMS`.
      value: the loss, [].
      form: `published` does not keep a value that is too large, so that a loss which stays on a
        higher level is rejected from then on. `following` keeps it, cut to the limit, so that the
        mean follows it within a few values. `off` looks at nothing but whether a value is finite.

    Returns:
      (bool [], the new guard).
    """
    row = TERMS.index(term)
    value = jax.lax.stop_gradient(value).astype(guard.values.dtype)
    count = guard.counts[row]
    filled = jnp.minimum(count, KEPT)
    mean = guard.values[row].sum() / jnp.maximum(filled, 1)
    limit = SPIKE * mean
    spike = (filled >= NEEDED) & (mean > 0) & (value > limit)
    finite = jnp.isfinite(value)
    if form == "off":
        return finite, guard
    kept = LossGuard(
        guard.values.at[row, count % KEPT].set(jnp.where(spike, limit, value)),
        guard.counts.at[row].add(1),
    )
    return finite & ~spike, trees.select(finite & (~spike | (form == "following")), kept, guard)
