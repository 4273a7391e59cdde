"""FedRevive: Delta~ = (1 - beta(tau)) Delta + beta(tau) Delta^KD (arXiv 2511.00655)."""

import jax
import jax.numpy as jnp

from fedrevive_jax import blending
from fedrevive_jax.config import Config
from fedrevive_jax.dfkd import reviver
from fedrevive_jax.methods.method import (
    Ingredients,
    Method,
    UpdateRule,
    compose,
    server_optimizer,
)


def create(config: Config, ingredients: Ingredients) -> Method:
    revive = reviver.create(
        config,
        ingredients.model,
        ingredients.augment,
        frozen=ingredients.frozen,
        class_mixes=ingredients.class_mixes,
        seed_text=ingredients.seed_text,
        mesh=ingredients.mesh,
    )
    rule = blend(revive, blending.create(config))
    return compose(rule, config.buffer_size, server_optimizer(config))


def blend(revive: reviver.Reviver, beta_of: blending.Beta) -> UpdateRule:
    """The update rule; where nothing was distilled the plain update goes in *unblended*.

    Blending with a Delta^KD of zero would only shrink the update.
    """

    def apply(state, delta, params, upload, arrival, key):
        beta = jnp.asarray(beta_of(arrival.staleness), jnp.float32)
        state, revival = revive.revive(state, params, upload, arrival, beta, key)
        beta = jnp.where(revival.distilled, beta, 0.0)

        def mix(plain, distilled):
            weight = beta.astype(plain.dtype)
            return (1 - weight) * plain + weight * distilled

        delta = jax.tree.map(mix, delta, revival.delta)
        return state, delta, {"beta": beta, **revival.metrics}

    return UpdateRule(revive.init, apply)
