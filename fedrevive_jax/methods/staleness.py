"""s(tau): how much an update of staleness tau counts, in the shapes that asynchronous methods use.

None increases or leaves [0, 1]; all are 1 at tau = 0, but for 1 minus a constant beta.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedrevive_jax.config import Config
from fedrevive_jax.methods import blending

Weight = Callable[[jax.Array], jax.Array]


def polynomial(exponent: float) -> Weight:
    """(1 + tau)^(-a), FedAsync's (arXiv 1903.03934); a = 1/2 is FedBuff's (arXiv 2106.06639)."""
    return lambda tau: (1.0 + tau) ** -exponent


def hinge(slope: float, start: float) -> Weight:
    """1 for tau <= b, else 1 / (a (tau - b) + 1), FedAsync's (arXiv 1903.03934)."""
    return lambda tau: 1 / (slope * jnp.maximum(tau - start, 0.0) + 1)


def remainder(beta: blending.Beta) -> Weight:
    """1 - beta(tau), AFL-DW's (arXiv 2511.00655)."""
    return lambda tau: 1 - beta(tau)


def create(config: Config) -> Weight:
    """The shape that a configuration names, a function of traced or plain staleness."""
    return {
        "none": lambda: lambda tau: jnp.ones_like(tau / 1.0),
        "sqrt": lambda: polynomial(0.5),
        "polynomial": lambda: polynomial(config.staleness_exponent),
        "hinge": lambda: hinge(config.hinge_slope, config.hinge_start),
        "beta": lambda: remainder(blending.create(config)),
    }[config.staleness_weight]()
