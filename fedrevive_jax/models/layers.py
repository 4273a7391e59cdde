"""Layers shared by the networks: PyTorch's default start, convolutions, statistics."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedrevive_jax.models import convolutions

# PyTorch's default for kernels of dense and convolution layers: uniform in +-1/sqrt(fan_in).
# With no normalisation layers in the models, the start matters.
torch_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_bias_init(fan_in: int) -> nn.initializers.Initializer:
    """PyTorch's default for biases: uniform in +-1/sqrt(fan_in) of the layer's kernel."""

    def init(key, shape, dtype=jnp.float32):
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def dense(features: int, inputs: jax.Array, name: str, use_bias: bool = True) -> jax.Array:
    """A dense layer with PyTorch's start, applied to inputs [b, n]."""
    layer = nn.Dense(
        features,
        use_bias=use_bias,
        kernel_init=torch_kernel_init,
        bias_init=torch_bias_init(inputs.shape[-1]),
        name=name,
    )
    return layer(inputs)


def conv(
    features: int,
    inputs: jax.Array,
    name: str,
    *,
    size: int = 3,
    stride: int = 1,
    padding: int = 0,
    use_bias: bool = True,
    convolution: str = "auto",
) -> jax.Array:
    """A square convolution with PyTorch's start, applied to inputs [b, height, width, channels].

    Args:
      features: output channels.
      inputs: the images.
      name: name of the layer's parameters.
      size: height and width of the kernel (HWIO).
      stride: step in both directions.
      padding: pixels of zeros on every side. Explicit, because "SAME" pads strided convolutions
        differently from PyTorch.
      use_bias: whether to add a bias.
      convolution: see `convolutions.choose`.
    """
    layer = nn.Conv(
        features,
        (size, size),
        strides=stride,
        padding=((padding, padding), (padding, padding)),
        use_bias=use_bias,
        kernel_init=torch_kernel_init,
        bias_init=torch_bias_init(size * size * inputs.shape[-1]),
        conv_general_dilated=convolutions.choose(convolution),
        name=name,
    )
    return layer(inputs)


def max_pool_2x2(inputs: jax.Array) -> jax.Array:
    """2x2 max pooling with stride 2; an odd last row or column is dropped.

    Written as a reshape, whose gradient is cheap inside loops on every backend.
    """
    batch, height, width, channels = inputs.shape
    even = inputs[:, : height // 2 * 2, : width // 2 * 2]
    return even.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


def batch_statistics(activation: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance per channel over batch and space, [channels]."""
    axes = tuple(range(activation.ndim - 1))
    activation = activation.astype(jnp.promote_types(activation.dtype, jnp.float32))
    return activation.mean(axes), activation.var(axes)
