"""AFL-DW: stale updates are weighted down, Delta~ = (1 - beta(tau)) Delta (arXiv 2511.00655)."""

from fedrevive_jax import blending
from fedrevive_jax.config import Config
from fedrevive_jax.methods.method import Ingredients, Method, compose, server_optimizer, weighted


def create(config: Config, ingredients: Ingredients) -> Method:
    del ingredients
    beta = blending.create(config)
    rule = weighted(lambda tau: 1 - beta(tau))
    return compose(rule, config.buffer_size, server_optimizer(config))
