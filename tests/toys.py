"""Tiny models and settings whose results can be worked out by hand."""

import jax
import jax.numpy as jnp

from fedrevive_jax.messages import Arrival, Submission, Upload
from fedrevive_jax.models import Model


def scalar_model():
    """One parameter w; logits of an input x are (w * mean(x), 0); its tap is the input's mean."""

    def apply(params, inputs, key=None):
        del key
        activation = inputs.reshape(inputs.shape[0], -1).mean(axis=1)
        logits = jnp.stack([params["w"] * activation, jnp.zeros_like(activation)], axis=1)
        return logits, (activation[:, None],)

    return Model("scalar", (4, 4, 1), 2, lambda key: {"w": jnp.zeros(())}, apply)


def scalar_upload(w, mean=0.0, variance=1.0):
    tap = (jnp.full(1, mean), jnp.full(1, variance))
    return Upload({"w": jnp.asarray(float(w))}, (tap,), jnp.asarray(0.0))


def arrival(job=0, client=0, version=0, staleness=0, completes=True):
    integers = (jnp.asarray(v, jnp.int32) for v in (job, client, version, staleness))
    return Arrival(*integers, jnp.asarray(completes))


KEY = jax.random.key(0)


def submission(upload, facts, params, base=None, *, accepted=True, key=KEY):
    """What a method gets of an upload; its job started from `base`, or from the newest version."""
    base = params if base is None else base
    return Submission(upload, facts, base, params, jnp.asarray(accepted), key)
