"""What methods with a memory of every client's last update share.

With h_i the last update of client i (0 before its first), h = (1/N) sum_i h_i over all N clients,
and S the buffer:

    direction = beta h + (1/n) sum_S (Delta_i - beta h_i),    then h_i <- Delta_i for i in S,

where n = |S| = B (of which rejected uploads are no part; fedstale, ca2fl with beta = 1), or n = N
and beta = 1: the mean of all refreshed h_i (ace). With a staleness weight, s(tau_i) Delta_i stands
in the place of Delta_i, in h_i too. h is kept incrementally, in the order of arrival; a client that
is twice in a buffer is compared with its own update the second time. The entries h_i live outside
of this state, see `Method.entry`; only that of the arriving client is needed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedrevive_jax.config import Config
from fedrevive_jax.methods.method import Aggregation
from fedrevive_jax.models.model import Params


class CachedState(NamedTuple):
    """Pytrees like the parameters.

    Attributes:
      average: h, as it was at the last version.
      total: sum over the buffer of Delta_i - beta h_i.
      change: sum over the buffer of (new h_i - old h_i).
    """

    average: Params
    total: Params
    change: Params


def aggregation(config: Config, beta: float, over_all: bool = False) -> Aggregation:
    """The aggregation above.

    Args:
      config: `num_clients` and `cache_dtype` are read.
      beta: weight of what is remembered.
      over_all: n = N instead of n = B.
    """
    clients, dtype = config.num_clients, jnp.dtype(config.cache_dtype)

    def entry(params):
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, dtype), params)

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return CachedState(zeros, zeros, zeros)

    def take(state: CachedState, entry, delta, submission):
        # What is remembered is what the cache can hold, so that h stays the mean of its entries.
        fresh = jax.tree.map(lambda d: d.astype(dtype), delta)
        total = jax.tree.map(
            lambda t, d, h: t + (d - beta * h.astype(d.dtype)), state.total, delta, entry
        )
        change = jax.tree.map(
            lambda c, new, old: c + (new.astype(c.dtype) - old.astype(c.dtype)),
            state.change,
            fresh,
            entry,
        )
        return state._replace(total=total, change=change), fresh

    def direction(state: CachedState, taken, params):
        count = clients if over_all else taken
        found = jax.tree.map(lambda h, t: beta * h + t / count, state.average, state.total)
        average = jax.tree.map(lambda h, c: h + c / clients, state.average, state.change)
        zeros = jax.tree.map(jnp.zeros_like, state.total)
        return found, CachedState(average, zeros, zeros)

    return Aggregation(init, take, direction, entry)
