"""FedBuff: every B arrivals, theta <- theta + eta_s * mean(s(tau) Delta) (arXiv 2106.06639).

The comparison of arXiv 2511.00655 uses s = 1; FedBuff's own paper s = 1 / sqrt(1 + tau). The mean
is over B, not over the weights.
"""

import jax.numpy as jnp

from fedrevive_jax.config import Config
from fedrevive_jax.methods.method import (
    Ingredients,
    Method,
    as_it_is,
    compose,
    server_optimizer,
    weighted,
)


def create(config: Config, ingredients: Ingredients) -> Method:
    del ingredients
    rule = as_it_is()
    if config.staleness_weight == "sqrt":
        rule = weighted(lambda tau: 1 / jnp.sqrt(1.0 + tau))
    return compose(rule, config.buffer_size, server_optimizer(config))
