"""CA2FL: FedBuff, calibrated by every client's last update (Wang et al., ICLR 2024).

    v = h + (1/B) sum_S (Delta_i - h_i),   theta <- theta + eta_s v,   then h_i <- Delta_i, i in S,

with h the mean over all N clients of their last updates h_i, as it was before this buffer.
"""

from fedrevive_jax.config import Config
from fedrevive_jax.methods import cached
from fedrevive_jax.methods.method import Ingredients, Method, compose, plain, server_optimizer


def create(config: Config, ingredients: Ingredients) -> Method:
    del ingredients
    aggregation = cached.aggregation(config, beta=1.0)
    return compose(plain(config), config.buffer_size, server_optimizer(config), aggregation)
