"""FedBuff: every B arrivals, theta <- theta + eta_s * mean(Delta) (arXiv 2106.06639).

Without a weight for staleness, as in the comparison of arXiv 2511.00655.
"""

from fedrevive_jax.config import Config
from fedrevive_jax.methods.method import Ingredients, Method, as_it_is, compose, server_optimizer


def create(config: Config, ingredients: Ingredients) -> Method:
    del ingredients
    return compose("fedbuff", as_it_is(), config.buffer_size, server_optimizer(config))
