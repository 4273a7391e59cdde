"""FedAvg: synchronous cohorts of K, theta <- theta + eta_s * mean(Delta) (McMahan et al., 2017).

The cohort is made by the schedule (B = K and K open slots); a round takes as long as its slowest
client.
"""

from fedrevive_jax.config import Config
from fedrevive_jax.methods.method import Ingredients, Method, compose, plain, server_optimizer


def create(config: Config, ingredients: Ingredients) -> Method:
    del ingredients
    return compose(plain(config), config.buffer_size, server_optimizer(config))
