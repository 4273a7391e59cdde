"""FedRevive: Delta~ = (1 - beta(tau)) Delta + beta(tau) Delta^KD (arXiv 2511.00655).

The step that takes Delta~ is FedBuff's, or by `revive_on` FedAsync's or FADAS's: Delta is then
what their rule makes of the raw update (weighted by staleness, or theta' - theta in FedAsync's
mixing form), while Delta^KD, which is never stale, goes in as it is. beta = 0 is that method.
"""

import jax
import jax.numpy as jnp

from fedrevive_jax.config import Config, Dfkd
from fedrevive_jax.dfkd import due, reviver
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.messages import Submission
from fedrevive_jax.methods import blending, fadas, fedasync, fedbuff
from fedrevive_jax.methods.method import Ingredients, Method, UpdateRule, as_it_is

BASES = {"fedbuff": fedbuff.base, "fedasync": fedasync.base, "fadas": fadas.base}


def create(config: Config, ingredients: Ingredients) -> Method:
    """FedRevive on what the configuration asks its teachers about.

    Raises:
      ConfigError: it distils on real samples, and there are none.
    """
    real = ingredients.real_samples
    if config.samples == "real" and (real is None or not len(real[1])):
        raise ConfigError("samples", "real", "needs a distillation split; there is none")
    revive = reviver.create(
        config,
        ingredients.model,
        ingredients.augment if config.synthesises else ingredients.augment_real,
        frozen=ingredients.frozen,
        class_mixes=ingredients.class_mixes,
        real_samples=real,
        seed_text=ingredients.seed_text,
        mesh=ingredients.mesh,
    )
    return revived(config, revive)


def revived(config: Config, revive: reviver.Reviver) -> Method:
    """The configured base method, its updates revived."""
    base = BASES[config.revive_on](config)
    rule = blend(revive, blending.create(config), config, base.rule)
    return base._replace(rule=rule).over(config.buffer_size)


def blend(
    revive: reviver.Reviver,
    beta_of: blending.Beta,
    settings: Dfkd,
    plain: UpdateRule | None = None,
) -> UpdateRule:
    """The update rule; where nothing was distilled the plain update goes in *unblended*.

    Blending with a Delta^KD of zero would only shrink the update. The authors' code does so during
    the warm-up; `warmup_blend=zero` reproduces it.

    Args:
      revive: offers Delta^KD.
      beta_of: beta(tau).
      settings: `warmup_blend`, and when the warm-up is.
      plain: a rule without state for the raw update; as it is where None.
    """
    plain = as_it_is() if plain is None else plain

    def apply(state, delta, submission: Submission):
        beta = jnp.asarray(beta_of(submission.arrival.staleness), jnp.float32)
        state, revival = revive.revive(state, beta, submission)
        _, delta, _ = plain.apply((), delta, submission)
        blended = revival.distilled
        if settings.warmup_blend == "zero":
            blended = blended | due.warming_up(settings, submission.arrival.version)
        beta = jnp.where(blended, beta, 0.0)

        def mix(raw, distilled):
            weight = beta.astype(raw.dtype)
            return (1 - weight) * raw + weight * distilled

        delta = jax.tree.map(mix, delta, revival.delta)
        return state, delta, {"beta": beta, **revival.metrics}

    return UpdateRule(revive.init, apply)
