"""An estimate of each client's class mix from its first uploads, without asking the client."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedrevive_jax.compute import trees
from fedrevive_jax.config import Dfkd
from fedrevive_jax.models import Model
from fedrevive_jax.models.model import Params, gaussian_inputs

UPLOADS = 2


class Proxies(NamedTuple):
    """Class-mix proxies of all clients.

    Attributes:
      total: float32 [N, classes], sum of the probes of a client so far.
      probes: int32 [N], uploads probed so far, at most 2; those that broke the model not counted.
    """

    total: jax.Array
    probes: jax.Array


def unknown(num_clients: int, num_classes: int) -> Proxies:
    return Proxies(jnp.zeros((num_clients, num_classes)), jnp.zeros(num_clients, jnp.int32))


def known(class_mixes: jax.Array) -> Proxies:
    """Proxies that are the true label histograms [N, classes] and are never probed."""
    mixes = jnp.asarray(class_mixes, jnp.float32)
    return Proxies(mixes * UPLOADS, jnp.full(len(mixes), UPLOADS, jnp.int32))


def probe(model: Model, params: Params, inputs: Any, temperature: float) -> jax.Array:
    """The mean of softmax(logits / T_probe) over Gaussian inputs; float32 [classes]."""
    logits, _ = model.apply(params, inputs)
    return jax.nn.softmax(logits / temperature).mean(axis=0)


def observe(
    proxies: Proxies,
    model: Model,
    params: Params,
    client: jax.Array,
    key: jax.Array,
    settings: Dfkd,
    *,
    frozen: Any = (),
    wanted: jax.Array | bool = True,
) -> Proxies:
    """Probes an uploaded model, if it is wanted and one of its client's first two with a finite
    answer."""

    def update(proxies):
        inputs = gaussian_inputs(model, key, settings.proxy_samples, frozen)
        estimate = probe(model, params, inputs, settings.proxy_temperature)
        added = Proxies(proxies.total.at[client].add(estimate), proxies.probes.at[client].add(1))
        # A model that overflows tells nothing of its client; its next upload is probed instead.
        return trees.select(trees.all_finite(estimate), added, proxies)

    due = wanted & (proxies.probes[client] < UPLOADS)
    return jax.lax.cond(due, update, lambda p: p, proxies)


def of_clients(proxies: Proxies, clients: jax.Array) -> jax.Array:
    """q of the given clients, [len(clients), classes]; zero where client is -1 or unknown."""
    found = proxies.total[clients] / jnp.maximum(proxies.probes[clients], 1)[:, None]
    return jnp.where((clients >= 0)[:, None], found, 0.0)
