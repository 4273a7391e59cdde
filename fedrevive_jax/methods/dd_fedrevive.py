"""DD-FedRevive: FedRevive on held-out real samples, the data-dependent upper reference.

Nothing is synthesised and nothing has to warm up; the comparison uses a constant beta, a higher
distillation temperature and no weight decay (arXiv 2511.00655, appendix). As in the authors' code
there is no loss guard, teachers are drawn for by the true class histograms, and the samples are
augmented as those of the clients. `revive_on` holds here too.
"""

from fedrevive_jax.config import Config
from fedrevive_jax.dfkd import reviver
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.methods.fedrevive import revived
from fedrevive_jax.methods.method import Ingredients, Method


def create(config: Config, ingredients: Ingredients) -> Method:
    if ingredients.real_samples is None or not len(ingredients.real_samples[1]):
        raise ConfigError(
            "method", config.method, "needs samples in the distillation split; there are none"
        )
    revive = reviver.create(
        config,
        ingredients.model,
        ingredients.augment_real,
        frozen=ingredients.frozen,
        class_mixes=ingredients.class_mixes,
        real_samples=ingredients.real_samples,
        mesh=ingredients.mesh,
    )
    return revived(config, revive)
