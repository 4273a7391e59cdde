"""Models behind one small record of pure functions; a network per file."""

import importlib

from fedrevive_jax.config import Config, ConfigError
from fedrevive_jax.models.model import Model, from_flax, parameter_count, tap_statistics

__all__ = [
    "NETWORKS",
    "Model",
    "create",
    "from_config",
    "from_flax",
    "parameter_count",
    "tap_statistics",
]

# name -> module with `build(num_classes, width, convolution) -> flax Module`.
NETWORKS = {
    "digitsnet": "fedrevive_jax.models.digitsnet",
    "convnet": "fedrevive_jax.models.convnet",
    "resnet18": "fedrevive_jax.models.resnet",
}


def from_config(config: Config, input_shape: tuple[int, ...], num_classes: int) -> Model:
    """The model that a configuration names, for a data set's inputs and classes."""
    if config.model not in NETWORKS:
        raise ConfigError(
            f"--model={config.model}: is given from Python, run(config, model=...); by name: "
            + ", ".join(NETWORKS)
        )
    return create(
        config.model,
        input_shape=input_shape,
        num_classes=num_classes,
        width=config.model_width,
        convolution=config.convolution,
    )


def create(
    name: str,
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    width: int,
    convolution: str = "auto",
) -> Model:
    """The model called `name`.

    Args:
      name: a key of `NETWORKS`.
      input_shape: (height, width, channels) of one image.
      num_classes: size of the logits.
      width: channels of the first convolution.
      convolution: see `models.layers.convolution`.
    """
    module = importlib.import_module(NETWORKS[name])
    return from_flax(name, module.build(num_classes, width, convolution), input_shape, num_classes)
