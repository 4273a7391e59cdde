"""ACE: every arrival steps along the mean of all clients' last updates (arXiv 2511.19066).

    h_i <- Delta_i of the arriving client,   theta <- theta + eta_s (1/N) sum_j h_j.

The published method first contacts every client once; here a client counts as 0 until it arrives.
"""

from fedrevive_jax.config import Config
from fedrevive_jax.methods import cached
from fedrevive_jax.methods.method import Ingredients, Method, compose, plain, server_optimizer


def create(config: Config, ingredients: Ingredients) -> Method:
    del ingredients
    aggregation = cached.aggregation(config, beta=1.0, over_all=True)
    return compose(plain(config), config.buffer_size, server_optimizer(config), aggregation)
