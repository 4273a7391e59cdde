"""Layers shared by the networks: PyTorch's default start, convolutions, statistics."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fedrevive_jax.models import convolutions

# PyTorch's default for kernels of dense and convolution layers: uniform in +-1/sqrt(fan_in).
# With no normalisation layers in the models, the start matters.
torch_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


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
    return _Conv(features, size, stride, padding, use_bias, convolution, name=name)(inputs)


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

    @nn.compact
    def __call__(self, x):
        shape = (self.size, self.size, x.shape[-1], self.features)
        convolve = convolutions.choose(self.convolution)
        y = convolve(
            x,
            self.param("kernel", torch_kernel_init, shape),
            (self.stride, self.stride),
            ((self.padding, self.padding),) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        if not self.use_bias:
            return y
        fan_in = self.size**2 * x.shape[-1]
        return add(y, self.param("bias", torch_bias_init(fan_in), (self.features,)))


def single(values: jax.Array) -> jax.Array:
    """In single precision at least."""
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def column_sums(values: jax.Array) -> jax.Array:
    """Sums over all axes but the last, in single precision at least."""
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


def max_pool_2x2(inputs: jax.Array, platform: str) -> jax.Array:
    """2x2 max pooling with stride 2; an odd last row or column is dropped.

    Written as a reshape, whose gradient is cheap inside loops on a CPU. A TPU would write down
    which of four are the largest, a third of a step of the ConvNet; it has a way of its own for
    windows. Of equal largest ones a reshape shares the gradient, a window gives it to the first.

    Args:
      inputs: [b, height, width, channels].
      platform: see `model.Model`.
    """
    if platform == "tpu":
        lowest = np.asarray(-np.inf, inputs.dtype)
        window = (1, 2, 2, 1)
        return jax.lax.reduce_window(inputs, lowest, jax.lax.max, window, window, "VALID")
    batch, height, width, channels = inputs.shape
    even = inputs[:, : height // 2 * 2, : width // 2 * 2]
    return even.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


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
