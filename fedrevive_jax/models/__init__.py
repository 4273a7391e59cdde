"""Models behind one small record of pure functions; a network per file."""

import importlib

import jax

from fedrevive_jax.config import Config
from fedrevive_jax.data.tokens import CLASSIFIER
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.models import convolutions, t5, t5_weights
from fedrevive_jax.models.model import (
    Model,
    default_precision,
    from_flax,
    parameter_count,
    tap_statistics,
    with_precision,
)

__all__ = [
    "NETWORKS",
    "Model",
    "create",
    "default_precision",
    "from_flax",
    "make_network",
    "parameter_count",
    "t5_shape",
    "tap_statistics",
    "with_precision",
]

# name -> module with `build(num_classes, width, convolution, platform) -> flax Module`, for images,
# and `HEAD`, the name of its last dense layer.
NETWORKS = {
    "digitsnet": "fedrevive_jax.models.digitsnet",
    "convnet": "fedrevive_jax.models.convnet",
    "resnet18": "fedrevive_jax.models.resnet",
}


def create(
    config: Config,
    input_shape: tuple[int, ...],
    num_classes: int,
    platform: str | None = None,
) -> Model:
    """The model that a configuration names, for a data set's inputs and classes.

    Args:
      config: names the model, its sizes and the way of a convolution.
      input_shape, num_classes: see `Model`.
      platform: see `from_flax`.
    """
    if config.model not in (*NETWORKS, "t5"):
        raise ConfigError(
            "model",
            config.model,
            "is given to `run` from Python; by name: " + ", ".join((*NETWORKS, "t5")),
        )
    is_text = len(input_shape) == 1
    if is_text != (config.model == "t5"):
        raise ConfigError(
            "model",
            config.model,
            f"does not read {'text' if is_text else 'images'}; must be "
            + ("t5" if is_text else f"one of {', '.join(NETWORKS)}"),
        )
    if config.model == "t5":
        return _t5(config, input_shape[0], num_classes, platform)
    return make_network(
        config.model,
        input_shape=input_shape,
        num_classes=num_classes,
        width=config.model_width,
        convolution=config.convolution,
        platform=platform,
    )


def _t5(config: Config, length: int, num_classes: int, platform: str | None) -> Model:
    shape = t5_shape(config)
    weights = t5_weights.read(config.t5_weights, shape) if config.t5_weights else None
    return t5.make_classifier(shape, length, num_classes, weights, platform)


def t5_shape(config: Config) -> t5.T5Shape:
    """Sizes of the encoder: those of the weights, or T5-small's proportions for a random start.

    Raises:
      ConfigError: see `t5_weights.read_shape`.
    """
    if config.t5_weights:
        return t5_weights.read_shape(config.t5_weights)
    return t5.T5Shape(
        vocabulary=config.vocabulary_size,
        width=config.model_width,
        feed_forward=4 * config.model_width,
        layers=config.model_layers,
        heads=config.model_heads,
        head_width=config.model_width // config.model_heads,
        classifier_token=CLASSIFIER,
    )


def make_network(
    name: str,
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    width: int,
    convolution: str = "auto",
    platform: str | None = None,
) -> Model:
    """The model called `name`.

    Args:
      name: a key of `NETWORKS`.
      input_shape: (height, width, channels) of one image.
      num_classes: size of the logits.
      width: channels of the first convolution.
      convolution: see `models.convolutions.choose`, or `auto`.
      platform: see `from_flax`.
    """
    module = importlib.import_module(NETWORKS[name])
    platform = platform or jax.default_backend()
    way = convolutions.settled(convolution, platform)
    network = module.build(num_classes, width, way, platform)
    return from_flax(name, network, input_shape, num_classes, platform, module.HEAD)
