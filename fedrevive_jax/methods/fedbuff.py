"""FedBuff: every B arrivals, theta <- theta + eta_s * mean(s(tau) Delta) (arXiv 2106.06639).

The comparison of arXiv 2511.00655 uses s = 1; FedBuff's own paper s = 1 / sqrt(1 + tau). The mean
is over B, not over the weights.
"""

from fedrevive_jax.config import Config
from fedrevive_jax.methods.method import Base, Ingredients, Method, plain, server_optimizer


def base(config: Config) -> Base:
    return Base(plain(config), server_optimizer(config))


def create(config: Config, ingredients: Ingredients) -> Method:
    del ingredients
    return base(config).over(config.buffer_size)
