"""DD-FedRevive: FedRevive on held-out real images, the data-dependent upper reference.

Nothing is synthesised and nothing has to warm up; the comparison uses a constant beta, a higher
distillation temperature and no weight decay (arXiv 2511.00655, appendix).
"""

from fedrevive_jax import blending
from fedrevive_jax.config import Config, ConfigError
from fedrevive_jax.dfkd import reviver
from fedrevive_jax.methods.fedrevive import blend
from fedrevive_jax.methods.method import Ingredients, Method, compose, server_optimizer


def create(config: Config, ingredients: Ingredients) -> Method:
    if ingredients.real_images is None or not len(ingredients.real_images[1]):
        raise ConfigError(
            f"--method={config.method}: needs images in the distillation split; there are none"
        )
    revive = reviver.create(
        config,
        ingredients.model,
        ingredients.augment,
        class_mixes=ingredients.class_mixes,
        real_images=ingredients.real_images,
    )
    rule = blend(revive, blending.create(config))
    return compose(rule, config.buffer_size, server_optimizer(config))
