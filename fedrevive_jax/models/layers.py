"""Layers shared by the networks: PyTorch's default start, convolutions, statistics."""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fedrevive_jax.models import convolutions

# PyTorch's default for kernels of dense and convolution layers: uniform in +-1/sqrt(fan_in).
# With no normalisation layers in the models, the start matters.
torch_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Images(NamedTuple):
    """Images as layers give them to each other.

    Attributes:
      values: [b, height, width / n, n channels].
      beside: n, how many pixels of a row lie side by side, see `convolutions.pixels_beside`.
    """

    values: jax.Array
    beside: int = 1

    @property
    def columns(self) -> int:
        """The width in pixels."""
        return self.values.shape[2] * self.beside

    @property
    def channels(self) -> int:
        """Of a pixel."""
        return self.values.shape[3] // self.beside

    def apart(self) -> jax.Array:
        """[b, height, width / n, n, channels]; [b, height, width, channels] where n is 1."""
        shape = self.values.shape[:3]
        return self.values if self.beside == 1 else self.values.reshape(*shape, self.beside, -1)


# Rows that lie side by side in a product that sums them up on a CPU.
FOLDED = 64


def torch_bias_init(fan_in: int) -> nn.initializers.Initializer:
    """PyTorch's default for biases: uniform in +-1/sqrt(fan_in) of the layer's kernel."""

    def init(key, shape, dtype=jnp.float32):
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def dense(features: int, inputs: jax.Array, name: str, use_bias: bool = True) -> jax.Array:
    """A dense layer with PyTorch's start, applied to inputs [b, n]."""
    return _Dense(features, use_bias, name=name)(inputs)


def conv(
    features: int,
    inputs: jax.Array,
    name: str,
    *,
    size: int = 3,
    stride: int = 1,
    padding: int = 0,
    use_bias: bool = True,
    convolution: str = "lax",
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
    layer = _Conv(features, size, stride, padding, use_bias, convolution, "cpu", name=name)
    return layer(Images(inputs)).values


def conv_beside(
    features: int,
    images: Images,
    name: str,
    *,
    platform: str,
    size: int = 3,
    stride: int = 1,
    padding: int = 0,
    use_bias: bool = True,
    convolution: str = "lax",
) -> Images:
    """The layer of `conv`, with as many pixels side by side in its result as a platform asks for.

    Args:
      platform: see `model.Model`.
      features, name, size, stride, padding, use_bias, convolution: see `conv`.
      images: what it is applied to.
    """
    layer = _Conv(features, size, stride, padding, use_bias, convolution, platform, name=name)
    return layer(images)


# Flax's own layers would sum a bias's gradient, over batch and space, in the precision of the
# activations, which loses a fifth of it in bfloat16.
class _Dense(nn.Module):
    features: int
    use_bias: bool

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", torch_kernel_init, (x.shape[-1], self.features))
        y = x @ kernel
        if not self.use_bias:
            return y
        return add(y, self.param("bias", torch_bias_init(x.shape[-1]), (self.features,)))


class _Conv(nn.Module):
    features: int
    size: int
    stride: int
    padding: int
    use_bias: bool
    convolution: str
    platform: str

    @nn.compact
    def __call__(self, x: Images) -> Images:
        shape = (self.size, self.size, x.channels, self.features)
        kernel = self.param("kernel", torch_kernel_init, shape)
        convolve = convolutions.choose(self.convolution)
        result = (x.columns + 2 * self.padding - self.size) // self.stride + 1
        after = convolutions.pixels_beside(self.platform, len(x.values), self.features, result)
        # From one group of the result to the next are whole groups of the inputs.
        before = math.gcd(x.beside, self.stride * after)
        stride, sides = self.stride, (self.padding, self.padding)
        if (before, after) != (1, 1):
            kernel, stride, sides = convolutions.for_pixels_beside(
                kernel, self.stride, self.padding, x.columns, before, after
            )
        y = convolve(
            x.values.reshape(*x.values.shape[:2], x.columns // before, -1),
            kernel,
            (self.stride, stride),
            ((self.padding, self.padding), sides),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        if self.use_bias:
            fan_in = self.size**2 * x.channels
            bias = self.param("bias", torch_bias_init(fan_in), (self.features,))
            y = add(y, jnp.tile(bias, after))
        return Images(y, after)


def relu(*images: Images) -> Images:
    """The positive part of images, or of the sum of several."""
    total = functools.reduce(jnp.add, (own.values for own in images))
    return Images(nn.relu(total), images[0].beside)


def single(values: jax.Array) -> jax.Array:
    """In single precision at least."""
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def column_sums(values: jax.Array) -> jax.Array:
    """Sums over all axes but the last, in single precision at least."""
    if values.ndim == 5:
        # Pixels side by side stay so until their sums are added.
        together = values.reshape(*values.shape[:3], -1)
        return column_sums(together).reshape(values.shape[3:]).sum(0)
    flat = single(values).reshape(-1, values.shape[-1])
    return jax.lax.platform_dependent(flat, cpu=_column_products, default=lambda x: x.sum(0))


def _column_products(flat: jax.Array) -> jax.Array:
    # A product of matrices: with sums over rows a step of a narrow ConvNet takes a tenth longer.
    # Rows lie folded side by side, because a product adds up in one long row, which loses digits.
    rows, columns = flat.shape
    fold = math.gcd(rows, FOLDED)
    folded = flat.reshape(rows // fold, fold * columns)
    sums = jnp.ones((1, rows // fold), flat.dtype) @ folded
    return sums.reshape(fold, columns).sum(0)


def _larger(left: jax.Array, right: jax.Array) -> jax.Array:
    # Of equal ones the gradient goes to the first, as it does in a window.
    return jnp.where(left >= right, left, right)


@jax.custom_vjp
def add(x: jax.Array, bias: jax.Array) -> jax.Array:
    """A bias over the last axis, whose gradient is summed in single precision."""
    whole = bias.reshape((1,) * (x.ndim - 1) + (-1,))
    return (single(x) + single(whole)).astype(x.dtype)


def _add_forward(x, bias):
    return add(x, bias), bias


def _add_backward(bias, gradient):
    return gradient, column_sums(gradient).astype(bias.dtype)


add.defvjp(_add_forward, _add_backward)


def max_pool_2x2(images: Images, platform: str) -> Images:
    """2x2 max pooling with stride 2; an odd last row or column is dropped.

    Written as a reshape, whose gradient is cheap inside loops on a CPU. A TPU would write down
    which of four are the largest, a third of a step of the ConvNet; it has a way of its own for
    windows. Of equal largest ones a reshape shares the gradient, a window gives it to the first.

    Args:
      images: what is pooled.
      platform: see `model.Model`.
    """
    values, beside = images
    if platform == "tpu":
        lowest = np.asarray(-np.inf, values.dtype)
        window = (1, 2, 2 if beside == 1 else 1, 1)
        values = jax.lax.reduce_window(values, lowest, jax.lax.max, window, window, "VALID")
        if beside == 1:
            return Images(values)
        own = jnp.split(values, beside, axis=-1)
        pairs = [_larger(*own[i : i + 2]) for i in range(0, beside, 2)]
        return Images(jnp.concatenate(pairs, axis=-1), beside // 2)
    batch, height, width, channels = values.shape
    even = values[:, : height // 2 * 2, : width // 2 * 2]
    pooled = even.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))
    return Images(pooled)


def batch_statistics(activation: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance per channel over batch and space, [channels].

    Of activations in half precision in one pass, E[x^2] - E[x]^2 in single precision: what that
    loses is less than what their rounding has lost, unless a mean is more than thirty deviations.
    On a v5e it takes half of what two passes do.
    """
    count = activation.size // activation.shape[-1]
    mean = column_sums(activation) / count
    if activation.dtype == jnp.bfloat16:
        square = column_sums(single(activation) ** 2) / count
        return mean, jnp.maximum(square - mean**2, 0)
    deviation = single(activation) - mean.reshape((1,) * (activation.ndim - 1) + (-1,))
    return mean, column_sums(deviation**2) / count
