"""FedStale: between plain averaging and a variance-reduced memory (arXiv 2405.04171).

    direction = (1/B) sum_S Delta_i + beta (h - (1/B) sum_S h_i),   then h_i <- Delta_i, i in S;

beta = 0 is FedBuff, beta = 1 is CA2FL. The published method is round-based and weighs each client
by the inverse of its chance p_i to take part. Here a buffer takes the place of a round and every
p_i is B/N: 1/p_i of its own would multiply the rare arrivals of N = 1000 clients by a thousand.
The published weights by samples, alpha_i = n_i/n, are 1/N here: the same but for partition=natural.
"""

from fedrevive_jax.config import Config
from fedrevive_jax.methods import cached
from fedrevive_jax.methods.method import Ingredients, Method, compose, plain, server_optimizer


def create(config: Config, ingredients: Ingredients) -> Method:
    del ingredients
    aggregation = cached.aggregation(config, beta=config.fedstale_beta)
    return compose(plain(config), config.buffer_size, server_optimizer(config), aggregation)
