"""The class-conditional image generator, and synthesis of images with it."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedrevive_jax.dfkd import losses
from fedrevive_jax.dfkd.maker import Maker
from fedrevive_jax.models import layers
from fedrevive_jax.models.model import tap_statistics

EMBEDDING_WEIGHT = 0.2
EPSILON = 1e-5


class BatchNormalise(nn.Module):
    """Normalises with the batch's own statistics, always; scale and bias are learned."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        mean, variance = layers.batch_statistics(x)
        factor = scale * jax.lax.rsqrt(variance + EPSILON)
        mean, factor, bias = (channels_last(v, x.ndim) for v in (mean, factor, bias))
        return ((x - mean) * factor + bias).astype(x.dtype)


def channels_last(values: jax.Array, ndim: int) -> jax.Array:
    """[channels] with as many leading axes of length one as an array of rank `ndim` needs."""
    return values.reshape((1,) * (ndim - 1) + (-1,))


def upsample(x: jax.Array) -> jax.Array:
    """Twice the height and width, nearest neighbour."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


class Generator(nn.Module):
    """(z [b, latent], class embeddings [classes, latent], targets [b]) -> images in [0, 1].

    h = z + 0.2 e[y]; dense to (H/4, W/4, 2f); BatchNorm; x2; conv 2f; BatchNorm; LeakyReLU .2; x2;
    conv f; BatchNorm; LeakyReLU .2; conv to the image channels; sigmoid.
    """

    image_shape: tuple[int, int, int]
    features: int = 128
    convolution: str = "lax"

    @nn.compact
    def __call__(self, z, embeddings, targets):
        height, width, channels = self.image_shape
        features = self.features

        def conv(size, x, name, use_bias):
            return layers.conv(
                size, x, name, padding=1, use_bias=use_bias, convolution=self.convolution
            )

        x = z + EMBEDDING_WEIGHT * embeddings[targets]
        x = layers.dense(height // 4 * (width // 4) * 2 * features, x, "dense")
        x = x.reshape(-1, height // 4, width // 4, 2 * features)
        x = upsample(BatchNormalise(name="bn0")(x))
        x = conv(2 * features, x, "conv1", use_bias=False)
        x = nn.leaky_relu(BatchNormalise(name="bn1")(x), 0.2)
        x = conv(features, upsample(x), "conv2", use_bias=False)
        x = nn.leaky_relu(BatchNormalise(name="bn2")(x), 0.2)
        return jax.nn.sigmoid(conv(channels, x, "conv3", use_bias=True))


def image_maker(generator: Generator, latent_size: int, num_classes: int) -> Maker:
    """Images from latents (z [b, latent], class embeddings e [classes, latent]), both N(0, I).

    They are judged by the statistics of the whole batch inside a teacher.
    """

    def init(key):
        z, e = jnp.zeros((1, latent_size)), jnp.zeros((num_classes, latent_size))
        return generator.init(key, z, e, jnp.zeros(1, int))["params"]

    def draw(z_key, embedding_key, targets, frozen):
        del frozen
        z = jax.random.normal(z_key, (len(targets), latent_size))
        return (z, jax.random.normal(embedding_key, (num_classes, latent_size))), targets

    def make(params, latents, targets):
        return generator.apply({"params": params}, *latents, targets)

    def distance(activations, reference):
        return losses.statistics_distance(tap_statistics(activations), reference)

    return Maker(init, draw, make, distance)
