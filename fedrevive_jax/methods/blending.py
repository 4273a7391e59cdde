"""beta(tau): how much of a stale update is replaced, the more the staler it is.

Shapes published with arXiv 2511.00655. All are 0 at tau = 0 except the constant, never decrease,
and stay within [0, 1].
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedrevive_jax.config import Config

Beta = Callable[[jax.Array], jax.Array]


def cosine(s_max: float) -> Beta:
    """1/2 (1 - cos(pi tau / (2 s_max))) for tau <= 2 s_max, else 1."""
    return lambda tau: 0.5 * (1 - jnp.cos(math.pi * jnp.minimum(tau / (2 * s_max), 1.0)))


def constant(beta: float) -> Beta:
    """The same weight at any staleness."""
    return lambda tau: jnp.full_like(tau / 1.0, beta)


def linear(gamma: float) -> Beta:
    """min(1, gamma tau)."""
    return lambda tau: jnp.minimum(1.0, gamma * tau)


def exponential(rate: float) -> Beta:
    """1 - e^(-lambda tau)."""
    return lambda tau: -jnp.expm1(-rate * tau)


def stepwise(scale: float) -> Beta:
    """0, .25, .5, .75, 1 from 0, 1, 2, 3, 4 quarters of `scale` on; `scale` is 1.5 K / B."""
    return lambda tau: jnp.clip(jnp.floor(4 * tau / scale), 0, 4) / 4


def create(config: Config) -> Beta:
    """The shape that a configuration names, a function of traced or plain staleness."""
    if config.beta_shape == "cosine":
        return cosine(config.beta_s_max)
    if config.beta_shape == "constant":
        return constant(config.beta_constant)
    if config.beta_shape == "linear":
        return linear(config.beta_rate)
    if config.beta_shape == "exponential":
        return exponential(config.beta_rate)
    return stepwise(1.5 * config.concurrency / config.buffer_size)
