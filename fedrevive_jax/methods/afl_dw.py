"""AFL-DW: stale updates are weighted down, Delta~ = (1 - beta(tau)) Delta (arXiv 2511.00655)."""

from fedrevive_jax.config import Config
from fedrevive_jax.methods import blending, staleness
from fedrevive_jax.methods.method import Ingredients, Method, compose, server_optimizer, weighted


def create(config: Config, ingredients: Ingredients) -> Method:
    del ingredients
    rule = weighted(staleness.remainder(blending.create(config)))
    return compose(rule, config.buffer_size, server_optimizer(config))
