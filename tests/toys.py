"""Tiny models, methods, clocks and runs that several tests use."""

import jax
import jax.numpy as jnp
import numpy as np

from fedrevive_jax import methods
from fedrevive_jax.clock.delays import Durations
from fedrevive_jax.clock.schedule import simulate
from fedrevive_jax.messages import Arrival, Submission, Upload
from fedrevive_jax.models import Model
from fedrevive_jax.models.model import Head
from fedrevive_jax.presets import resolve
from fedrevive_jax.server import client_cache
from fedrevive_jax.simulation.simulator import Simulation


def scalar_model():
    """One parameter w; logits of an input x are (w * mean(x), 0); the input's mean is its tap, and
    the feature that its head reads."""

    def head(params, features):
        return jnp.stack([params["w"] * features[:, 0], jnp.zeros(len(features))], axis=1)

    def apply(params, inputs, key=None):
        del key
        activation = inputs.reshape(inputs.shape[0], -1).mean(axis=1)
        logits = jnp.stack([params["w"] * activation, jnp.zeros_like(activation)], axis=1)
        return logits, (activation[:, None],)

    return Model(
        "scalar",
        (4, 4, 1),
        2,
        lambda key: {"w": jnp.zeros(())},
        apply,
        head=Head(lambda params: params, lambda params: 1, head),
    )


def scalar_upload(w, mean=0.0, variance=1.0, method=None):
    """An upload of the scalar model; of a client that saw each class once, where a method asks."""
    tap = (jnp.full(1, mean), jnp.full(1, variance))
    extra = () if method is None else method.client.report(jnp.asarray([[0, 1]]))
    return Upload({"w": jnp.asarray(float(w))}, (tap,), jnp.asarray(0.0), extra)


def arrival(job=0, client=0, version=0, staleness=0, completes=True):
    integers = (jnp.asarray(v, jnp.int32) for v in (job, client, version, staleness))
    return Arrival(*integers, jnp.asarray(completes))


KEY = jax.random.key(0)


def submission(upload, facts, params, base=None, *, accepted=True, key=KEY):
    """What a method gets of an upload; its job started from `base`, or from the newest version."""
    base = params if base is None else base
    return Submission(upload, facts, base, params, jnp.asarray(accepted), key)


SMALL = {
    "model_width": 4, "num_clients": 12, "concurrency": 6, "samples_per_client": 20,
    "max_time": 6.0, "local_iterations": 2, "batch_size": 8, "num_teachers": 3, "latent_size": 6,
    "generator_features": 4, "synthesis_batch": 8, "pool_size": 32, "distillation_steps": 2,
    "distillation_batch": 4, "proxy_samples": 8, "freeze_versions": 3, "warmup_versions": 5,
    "generation_interval": 2, "beta_s_max": 3.0,
}  # fmt: skip


def small(method, **kwargs):
    return resolve("digits", method, **{**SMALL, **kwargs})


def play(config):
    simulation = Simulation(config)
    live = 0
    receipts = []
    for receipt in simulation.arrivals():
        live = max(live, len(simulation.server.live_versions))
        receipts.append(receipt)
    return simulation, receipts, live


def rows(receipts):
    return [(r.job, r.client, r.base_version, r.version, r.staleness) for r in receipts]


def assert_same_params(a, b, atol):
    for x, y in zip(*map(jax.tree.leaves, (a.server.params, b.server.params)), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=atol)


class Fixed:
    """Durations told by a table: train[client]; transfers of all clients or by client."""

    def __init__(self, train, download=0.0, upload=0.0):
        self._train = np.asarray(train, float)
        self._other = tuple(np.broadcast_to(x, self._train.shape) for x in (download, upload))

    def durations(self, visit):
        del visit
        return Durations(self._other[0], self._train, self._other[1])


def clock(model, clients, concurrency, buffer_size=1, open_slots=1, max_time=10.0, **kwargs):
    options = {"max_versions": 10**9, "seed": 0, **kwargs}
    return simulate(
        model,
        num_clients=clients,
        concurrency=concurrency,
        buffer_size=buffer_size,
        open_slots=open_slots,
        max_time=max_time,
        **options,
    )


TINY_METHOD = {
    "num_clients": 4, "concurrency": 2, "num_teachers": 2, "latent_size": 4,
    "generator_features": 2, "synthesis_batch": 4, "pool_size": 8, "distillation_steps": 1,
    "distillation_batch": 2,
    "proxy_samples": 4,
}  # fmt: skip


def make(name, **kwargs):
    config = resolve("digits", name, **{**TINY_METHOD, **kwargs})
    ingredients = methods.Ingredients(
        scalar_model(),
        lambda images, key: images,
        augment_real=lambda images, key: images.astype(jnp.float32),
        class_mixes=np.full((4, 2), 0.5, np.float32),
        real_samples=(np.ones((6, 4, 4, 1), np.uint8), np.asarray([0, 1] * 3, np.int32)),
    )
    return methods.create(config, ingredients)


def drive(method, params, uploads, accepted=True):
    """Submits (upload w, base w, arrival) one after the other; the history of w."""
    state, history, seen = method.init(params), [], []
    cache = client_cache.DeviceCache(method.entry(params), 4)
    step = jax.jit(method.step)
    for w, base, facts in uploads:
        params, state, entry, metrics = step(
            state,
            cache.fetch(int(facts.client)),
            submission(
                scalar_upload(w, method=method),
                facts,
                params,
                {"w": jnp.asarray(base)},
                accepted=accepted,
            ),
        )
        cache.store(int(facts.client), entry)
        history.append(float(params["w"]))
        seen.append({name: float(value) for name, value in metrics.items()})
    return history, seen


ONE = {"w": jnp.asarray(1.0)}


def scalar_reviver(delta, distilled=True):
    """A reviver that always offers the same Delta^KD."""
    from fedrevive_jax.dfkd.reviver import Revival, Reviver

    def revive(state, beta, submission):
        offer = Revival({"w": jnp.asarray(delta)}, jnp.asarray(distilled), {})
        return state, offer

    return Reviver(lambda params: (), revive)
