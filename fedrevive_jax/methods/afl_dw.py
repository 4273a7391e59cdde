"""AFL-DW: stale updates are weighted down, Delta~ = (1 - beta(tau)) Delta (arXiv 2511.00655)."""

import jax
import jax.numpy as jnp

from fedrevive_jax import blending
from fedrevive_jax.config import Config
from fedrevive_jax.methods.method import (
    Ingredients,
    Method,
    UpdateRule,
    compose,
    server_optimizer,
)


def create(config: Config, ingredients: Ingredients) -> Method:
    del ingredients
    rule = weigh_down(blending.create(config))
    return compose("afl_dw", rule, config.buffer_size, server_optimizer(config))


def weigh_down(beta_of: blending.Beta) -> UpdateRule:
    """Delta~ = (1 - beta(tau)) Delta."""

    def apply(state, delta, params, upload, arrival, key):
        del params, upload, key
        beta = jnp.asarray(beta_of(arrival.staleness), jnp.float32)
        delta = jax.tree.map(lambda d: (1 - beta).astype(d.dtype) * d, delta)
        return state, delta, {"beta": beta}

    return UpdateRule(lambda params: (), apply)
