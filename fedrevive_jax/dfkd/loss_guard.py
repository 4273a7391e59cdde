"""Keeps a spiking or broken loss term from moving anything."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedrevive_jax.compute import trees
from fedrevive_jax.config import Dfkd

TERMS = ("feature", "one_hot", "adversarial", "distillation")
KEPT = 20
NEEDED = 10
SPIKE = 3.0


class LossGuard(NamedTuple):
    """The last kept values of what is compared: of every term, or of every step of every term.

    Attributes:
      values: float32 [rows, 20], a ring each.
      counts: int32 [rows], values kept so far.
    """

    values: jax.Array
    counts: jax.Array


def init(settings: Dfkd) -> LossGuard:
    rows = sum(_steps(settings, term) for term in TERMS)
    return LossGuard(jnp.zeros((rows, KEPT)), jnp.zeros(rows, jnp.int32))


def _steps(settings: Dfkd, term: str) -> int:
    """How many rows a term has."""
    if settings.loss_guard != "per_step":
        return 1
    return settings.distillation_steps if term == "distillation" else settings.synthesis_steps


def check(
    guard: LossGuard, term: str, step: jax.Array | int, value: jax.Array, settings: Dfkd
) -> tuple[jax.Array, LossGuard]:
    """Whether a loss term may count in this step, and the guard after it.

    A value that is not finite, or more than 3 times the positive mean of at least 10 kept values,
    does not count. The adversarial term is never positive: of it only what is not finite does not
    count.

    Args:
      guard: the state.
      term: one of `TERMS`.
      step: of the synthesis or distillation.
      value: the loss, [].
      settings: `loss_guard`. `published` does not keep a value that is too large, so that a loss
        which stays on a higher level is rejected from then on. `per_step` keeps it, cut to the
        limit, so that the mean follows it within a few values, and compares a step with the same
        step of earlier syntheses or distillations: a loss that starts high each time is no spike.
        `off` looks at nothing but whether a value is finite.

    Returns:
      (bool [], the new guard).
    """
    form = settings.loss_guard
    before = TERMS[: TERMS.index(term)]
    row = sum(_steps(settings, earlier) for earlier in before)
    row = row + step if form == "per_step" else row
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
    return finite & ~spike, trees.select(finite & (~spike | (form != "published")), kept, guard)
