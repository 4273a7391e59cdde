"""Ways to compute a convolution: one function behind every layer, chosen by measurement.

Which way is fastest depends on the device and on the use: inside a loop or with weights that differ
from client to client, XLA's own convolution falls to slow paths on a CPU. All ways compute the same
and are differentiable in both arguments, twice where full MAML asks for it. `python -m
experiments.benchmark --convolutions` measures them on the machine at hand.
"""

import functools
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.xla_metadata import set_xla_metadata

WAYS = ("lax", "patches", "shifted", "mixed")


def settled(how: str, platform: str) -> str:
    """The way that `auto` stands for on a platform; any other is itself.

    On a CPU mixed: XLA's convolutions run at the peak there, but not the gradients that JAX derives
    from them, with which a step of the ConvNet takes 1.8 s instead of 28 ms. Accelerators have fast
    gradients of their own; with weights that differ from client to client they have not been
    measured.
    """
    if how != "auto":
        return how
    return "mixed" if platform == "cpu" else "lax"


def choose(how: str) -> Callable:
    """A function with the signature of `lax.conv_general_dilated`, for NHWC images, HWIO kernels.

    Args:
      how: `lax`: XLA's convolution. `patches`: shifted slices side by side, times the kernel as one
        matrix. `shifted`: the sum of one matrix product for each place of the kernel; needs the
        least memory. `mixed`: XLA's convolution with gradients of our own, see `mixed`.
    """
    if how == "lax":
        return jax.lax.conv_general_dilated
    if how not in WAYS:
        raise ValueError(f"convolution: must be one of {', '.join(WAYS)}; is {how!r}")
    return functools.partial(_plain, how)


def _plain(
    how: str,
    inputs,
    kernel,
    window_strides,
    padding,
    *,
    lhs_dilation=None,
    rhs_dilation=None,
    dimension_numbers=None,
    feature_group_count=1,
    precision=None,
    **unused,
):
    """A convolution without groups and dilation, in one of the ways that are not XLA's."""
    del dimension_numbers, unused
    dilated = any(d != 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
    if feature_group_count != 1 or dilated:
        raise ValueError(f"the {how} convolution knows neither groups nor dilation")
    if how == "mixed":
        # Asked here: a rule's way back is traced where no setting around the model reaches it.
        precision = precision or getattr(jax.config, DEFAULT_PRECISION)
        sides = tuple(map(tuple, padding))
        return mixed(inputs, kernel, tuple(window_strides), sides, precision)
    # Zero is no array here: where a loop is differentiated twice, JAX 0.10.2 confuses what the rule
    # of `mixed` saves with a constant array of its forward pass.
    zero = np.zeros((), inputs.dtype)
    inputs = jax.lax.pad(inputs, zero, [(0, 0, 0), *((*side, 0) for side in padding), (0, 0, 0)])
    rows, columns = (
        (inputs.shape[axis + 1] - kernel.shape[axis]) // window_strides[axis] + 1 for axis in (0, 1)
    )
    places = list(itertools.product(range(kernel.shape[0]), range(kernel.shape[1])))
    slices = [
        inputs[
            :,
            i : i + (rows - 1) * window_strides[0] + 1 : window_strides[0],
            j : j + (columns - 1) * window_strides[1] + 1 : window_strides[1],
        ]
        for i, j in places
    ]
    # Half precision is summed in single, as units for it do.
    sums = jnp.promote_types(inputs.dtype, jnp.float32)
    product = functools.partial(jnp.matmul, precision=precision, preferred_element_type=sums)
    if how == "shifted":
        products = (product(x, kernel[place]) for x, place in zip(slices, places, strict=True))
        result = functools.reduce(jnp.add, products)
    else:
        flat = kernel.reshape(-1, kernel.shape[-1])
        result = product(jnp.concatenate(slices, axis=-1), flat)
    return result.astype(inputs.dtype)


# --- pixels side by side --------------------------------------------------------------------------

# Numbers that a TPU holds side by side.
LANES = 128


def pixels_beside(platform: str, images: int, channels: int, columns: int) -> int:
    """How many pixels of a row lie side by side in an image, as one pixel with more channels.

    A TPU pads channels to 128, in its memory and in its products: with 64 a product uses a quarter
    of the unit. With two pixels side by side it uses all of it, half of that for zeros of the
    kernel. On a v5e a step of 13 jobs of FEMNIST takes 0.56 of the cycles then, one of two jobs of
    CIFAR-10 0.87.

    Args:
      platform: see `model.Model`.
      images: in the call. Where they are a multiple of 128 the images lie side by side, and
        channels need no others then. A last tile that is not full costs more than zeros: of 320
        images a forward pass of ResNet-18 takes 0.91 of the cycles in pairs.
      channels, columns: of an image.

    Returns:
      A power of two that divides the columns; 1 on other platforms.
    """
    beside = 1
    if platform != "tpu" or images % LANES == 0:
        return beside
    while 2 * beside * channels <= LANES and columns % (2 * beside) == 0:
        beside *= 2
    return beside


def for_pixels_beside(
    kernel: jax.Array, stride: int, padding: int, columns: int, before: int, after: int
) -> tuple[jax.Array, int, tuple[int, int]]:
    """A convolution's kernel, and its stride and padding along a row, for pixels side by side.

    Args:
      kernel: [rows, columns, channels, features].
      stride, padding: along a row, of pixels.
      columns: pixels in a row of the inputs.
      before, after: pixels side by side in the inputs and in the result; they divide the columns
        of each, and `before` divides `stride` * `after`.

    Returns:
      A kernel [rows, reach, before * channels, after * features] that reads all that `after`
      neighbours read, with zeros where one of them does not; stride and padding of groups of
      `before` pixels.
    """
    rows, size, channels, features = kernel.shape
    groups = ((columns + 2 * padding - size) // stride + 1) // after
    step = stride * after // before
    # The first group's first output reads from -padding on, which is within a group.
    low = -(-padding // before)
    begin = low * before - padding
    reach = -(-(begin + stride * (after - 1) + size) // before)
    high = (groups - 1) * step + reach - low - columns // before
    wide = []
    for own in range(after):
        place = begin + stride * own
        sides = (place, reach * before - size - place)
        alone = jnp.pad(kernel, ((0, 0), sides, (0, 0), (0, 0)))
        wide.append(alone.reshape(rows, reach, before * channels, features))
    return jnp.concatenate(wide, axis=-1), step, (low, high)


# --- values and gradients, each in its own way ---------------------------------------------------

# JAX's setting; its name is made at run time, so that a checker does not know it.
DEFAULT_PRECISION = "jax_default_matmul_precision"
# Numbers of a patch below which a product of patches is faster than XLA's convolution.
SMALL_PATCH = 9 * 4


def _mixed(
    inputs: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
    precision: str | None = None,
) -> jax.Array:
    """A convolution for CPUs, XLA's own with gradients that are such convolutions, too.

    XLA has a fast convolution for NHWC images and HWIO kernels, but not, inside a loop, for the
    other orders of axes in which it writes the gradient of a kernel: 1.9 s instead of 11 ms. So the
    axes are brought in order here. Small patches, and the gradients of strided convolutions, which
    would be dilated, are products of patches.

    Args:
      inputs: [b, height, width, channels].
      kernel: [rows, columns, channels, features].
      strides, padding: of both sides.
      precision: of all products.
    """
    if math.prod(kernel.shape[:3]) < SMALL_PATCH:
        return _plain("patches", inputs, kernel, strides, padding, precision=precision)
    return _own_kernels(strides, padding, precision)(inputs, kernel)


mixed = jax.custom_vjp(_mixed, nondiff_argnums=(2, 3, 4))


def _mixed_forward(inputs, kernel, strides, padding, precision):
    return mixed(inputs, kernel, strides, padding, precision), (inputs, kernel)


def _mixed_backward(strides, padding, precision, saved, gradient):
    inputs, kernel = saved
    inputs, gradient = _kept(inputs), _kept(gradient)
    sides = list(zip(kernel.shape, padding, strict=False))
    plain = strides == (1, 1) and all(max(pair) < size for size, pair in sides)

    def with_patches(x, k):
        return _plain("patches", x, k, strides, padding, precision=precision)

    if plain and math.prod(kernel.shape[:3]) >= SMALL_PATCH:
        # A convolution of the outputs' gradient with the kernel turned.
        turned = kernel[::-1, ::-1].swapaxes(2, 3)
        opposite = tuple((size - 1 - low, size - 1 - high) for size, (low, high) in sides)
        by_inputs = mixed(gradient, turned, strides, opposite, precision)
    else:
        (by_inputs,) = jax.vjp(lambda x: with_patches(x, kernel), inputs)[1](gradient)
    if plain:
        # A convolution of the inputs with that gradient as a kernel: images are the channels.
        turned, weights = inputs.transpose(3, 1, 2, 0), gradient.transpose(1, 2, 0, 3)
        by_kernel = mixed(turned, weights, strides, padding, precision).transpose(1, 2, 0, 3)
    else:
        (by_kernel,) = jax.vjp(lambda k: with_patches(inputs, k), kernel)[1](gradient)
    return by_inputs, by_kernel


mixed.defvjp(_mixed_forward, _mixed_backward)


def _kept(array: jax.Array) -> jax.Array:
    """The same array, with which nothing that comes before is fused.

    A change of the order of axes is ten times slower in one loop with what makes the array, a ReLU,
    say. XLA puts calls in place before it fuses, but those it is told not to.
    """
    with set_xla_metadata(inlineable="false"):
        return _same(array)


@jax.jit
def _same(array):
    return array


def _own_kernels(strides, padding, precision) -> Callable:
    """XLA's convolution; where jobs with kernels of their own are mapped together, one by one.

    A grouped convolution is slow on a CPU.
    """

    @jax.custom_batching.custom_vmap
    def convolve(inputs, kernel):
        named = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            inputs, kernel, strides, padding, dimension_numbers=named, precision=precision
        )

    @convolve.def_vmap
    def several(size, batched, inputs, kernel):
        if batched[1]:
            whole = inputs if batched[0] else jnp.broadcast_to(inputs, (size, *inputs.shape))
            return jax.lax.map(lambda pair: convolve(*pair), (whole, kernel)), True
        together = convolve(inputs.reshape(-1, *inputs.shape[2:]), kernel)
        return together.reshape(size, -1, *together.shape[1:]), True

    return convolve
