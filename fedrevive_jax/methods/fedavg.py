"""FedAvg: synchronous cohorts of K, theta <- theta + eta_s * mean(Delta) (McMahan et al., 2017).

The cohort is made by the schedule (B = K and K open slots); a round takes as long as its slowest
client.
"""

from fedrevive_jax.config import Config
from fedrevive_jax.methods.method import Base, Ingredients, Method, plain, server_optimizer


def base(config: Config) -> Base:
    return Base(plain(config), server_optimizer(config))


def create(config: Config, ingredients: Ingredients) -> Method:
    del ingredients
    return base(config).over(config.buffer_size)
