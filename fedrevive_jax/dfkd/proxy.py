"""An estimate of each client's class mix from its uploads, without asking the client.

As published, a client's first two uploads are asked about noise. Early in a run their answers tell
more of the start than of the client. What its job *changed* in the answers tells the client from
the first upload on: a class that it has has risen, one that it lacks has fallen.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedrevive_jax.compute import trees
from fedrevive_jax.config import Dfkd
from fedrevive_jax.models import Model
from fedrevive_jax.models.model import Params, gaussian_inputs

UPLOADS = 2
# How sharply a mix follows what a job changed: the largest change is e^4 of an answer that did not
# change. Between 3 and 5 the mixes of Fashion-MNIST's clients were met best.
SHARPNESS = 4.0


class Proxies(NamedTuple):
    """Class-mix proxies of all clients.

    Attributes:
      total: float32 [N, classes], sum of the probes of a client so far.
      probes: int32 [N], uploads that count so far; those that broke the model do not.
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


def change(model: Model, params: Params, base: Params, inputs: Any) -> jax.Array:
    """softmax(4 d / max |d|), d the change of the mean answer to Gaussian inputs that a job made,
    less its mean over the classes; float32 [classes].

    Where nothing changed, all classes are alike.
    """
    before, after = (model.apply(p, inputs)[0].mean(axis=0) for p in (base, params))
    difference = after - before
    difference = difference - difference.mean()
    largest = jnp.abs(difference).max()
    return jax.nn.softmax(SHARPNESS * difference / jnp.where(largest > 0, largest, 1.0))


def observe(
    proxies: Proxies,
    model: Model,
    params: Params,
    base: Params,
    client: jax.Array,
    key: jax.Array,
    settings: Dfkd,
    *,
    frozen: Any = (),
    wanted: jax.Array | bool = True,
) -> Proxies:
    """Learns of a client from an upload, if it is wanted and its answers are finite: from the first
    two by `probe`, or from all by `change`.

    Args:
      proxies: what is known.
      model: the model.
      params, base: what was uploaded, and the version that its job started from.
      client: int32 [], who sent it.
      key: for the inputs.
      settings: `proxy`, `proxy_samples` and `proxy_temperature` are read.
      frozen: the model's frozen arrays.
      wanted: bool [].
    """

    def update(proxies):
        inputs = gaussian_inputs(model, key, settings.proxy_samples, frozen)
        if settings.proxy == "change":
            estimate = change(model, params, base, inputs)
        else:
            estimate = probe(model, params, inputs, settings.proxy_temperature)
        added = Proxies(proxies.total.at[client].add(estimate), proxies.probes.at[client].add(1))
        # A model that overflows tells nothing of its client; its next upload is probed instead.
        return trees.select(trees.all_finite(estimate), added, proxies)

    due = wanted
    if settings.proxy != "change":
        due = due & (proxies.probes[client] < UPLOADS)
    return jax.lax.cond(due, update, lambda p: p, proxies)


def of_clients(proxies: Proxies, clients: jax.Array) -> jax.Array:
    """q of the given clients, [len(clients), classes]; zero where client is -1 or unknown."""
    found = proxies.total[clients] / jnp.maximum(proxies.probes[clients], 1)[:, None]
    return jnp.where((clients >= 0)[:, None], found, 0.0)
