"""Ways to compute a convolution: one function behind every layer, chosen by measurement.

Which way is fastest depends on the device and on the use: inside a loop or with weights that differ
from client to client, XLA's own convolution falls to slow paths on a CPU. All ways compute the same
and are differentiable in both arguments, twice where full MAML asks for it. `python -m
experiments.benchmark --convolutions` measures them on the machine at hand.
"""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

WAYS = ("lax", "patches", "shifted", "mixed")


def default() -> str:
    """What `auto` stands for on the backend at hand.

    On a CPU mixed: XLA's convolutions run at the peak there, but not the gradients that it derives
    from them, which take 1.8 s a step of the ConvNet. Accelerators have fast gradients of their
    own; with weights that differ from client to client they have not been measured.
    """
    return "mixed" if jax.default_backend() == "cpu" else "lax"


def choose(how: str) -> Callable:
    """A function with the signature of `lax.conv_general_dilated`, for NHWC images, HWIO kernels.

    Args:
      how: `lax`: XLA's convolution. `patches`: shifted slices side by side, times the kernel as one
        matrix. `shifted`: the sum of one matrix product for each place of the kernel; needs the
        least memory. `mixed`: values and each gradient in a way of its own, see `mixed`; patches
        in half precision. `auto`: by the backend, see `default`.
    """
    if how == "auto":
        how = default()
    if how == "lax":
        return jax.lax.conv_general_dilated
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
        # Sums of rounded numbers would be rounded again: not in half precision.
        if inputs.dtype != jnp.bfloat16:
            return mixed(inputs, kernel, tuple(window_strides), tuple(map(tuple, padding)))
        how = "patches"
    inputs = jnp.pad(inputs, ((0, 0), *padding, (0, 0)))
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
        result = sum(product(x, kernel[place]) for x, place in zip(slices, places, strict=True))
    else:
        flat = kernel.reshape(-1, kernel.shape[-1])
        result = product(jnp.concatenate(slices, axis=-1), flat)
    return result.astype(inputs.dtype)


# --- values and gradients, each in its own way ---------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def mixed(
    inputs: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
) -> jax.Array:
    """A convolution for CPUs that computes values alone in another way than values of which
    gradients are taken.

    Few channels are folded, see `folded`, or go by patches. For many, values alone, of evaluations,
    are XLA's convolution; with gradients, that of the inputs is a convolution of the same kind with
    the kernel turned; that of the kernel is a sum over images and places, for which XLA has no fast
    way, and a product of Winograd's tiles.

    Milliseconds on two cores: 320 images through the ConvNet 85 (by tiles 133, patches 187), a
    training step of 32 images 43 (by tiles throughout 49, patches 57); a step of ResNet-18 848
    (patches 1218). On one core a step of a ConvNet of width 8 takes 4.1 (patches 5.3), its values
    1.1 (patches 1.7, XLA 2.4); at width 32 folding gains nothing any more.

    Args:
      inputs: [b, height, width, channels].
      kernel: [rows, columns, channels, features].
      strides, padding: of both sides.
    """
    if _few(kernel) and _folds(inputs, strides):
        return folded(inputs, kernel, padding)
    return _own_kernels(strides, padding)(inputs, kernel)


def _mixed_forward(inputs, kernel, strides, padding):
    way = _few_channels if _few(kernel) else _many_channels
    return jax.vjp(lambda x, k: way(x, k, strides, padding), inputs, kernel)


def _mixed_backward(strides, padding, pull_back, gradient):
    del strides, padding
    return pull_back(gradient)


mixed.defvjp(_mixed_forward, _mixed_backward)


def _few(kernel) -> bool:
    return min(kernel.shape[2:]) < 32


def _folds(inputs, strides) -> bool:
    # The patches of smaller images stay in the caches: digits' 8x8 are a quarter slower folded.
    return strides == (1, 1) and min(inputs.shape[1:3]) >= 12


def _few_channels(inputs, kernel, strides, padding):
    if _folds(inputs, strides):
        return folded(inputs, kernel, padding)
    return _with_patches(inputs, kernel, strides, padding)


def _with_patches(inputs, kernel, strides, padding):
    return _plain("patches", inputs, kernel, strides, padding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _many_channels(inputs, kernel, strides, padding):
    # XLA hands convolutions without padding to a library that is slow inside loops, 38 ms instead
    # of 12; with padding Winograd's tiles are faster from 128 channels on.
    if _tiles_fit(kernel, strides, padding):
        places = min(_geometry(inputs, padding[0][0])[1:3])
        least = 128 if padding[0][0] else 32
        if min(kernel.shape[2:]) >= least and 4 <= places <= 28:
            return winograd(inputs, kernel, padding[0][0])
    return _own_kernels(strides, padding)(inputs, kernel)


def _many_channels_forward(inputs, kernel, strides, padding):
    return _many_channels(inputs, kernel, strides, padding), (inputs, kernel)


def _many_channels_backward(strides, padding, saved, gradient):
    inputs, kernel = saved
    sides = list(zip(kernel.shape, padding, strict=False))
    if strides == (1, 1) and all(max(pair) < size for size, pair in sides):
        turned = kernel[::-1, ::-1].swapaxes(2, 3)
        opposite = tuple((size - 1 - low, size - 1 - high) for size, (low, high) in sides)
        by_inputs = _many_channels(gradient, turned, strides, opposite)
    else:
        pull_back = jax.vjp(lambda x: _with_patches(x, kernel, strides, padding), inputs)[1]
        (by_inputs,) = pull_back(gradient)
    if _tiles_fit(kernel, strides, padding) and min(gradient.shape[1:3]) >= 4:
        by_kernel = winograd_kernel_gradient(inputs, gradient, padding[0][0])
    else:
        pull_back = jax.vjp(lambda k: _with_patches(inputs, k, strides, padding), kernel)[1]
        (by_kernel,) = pull_back(gradient)
    return by_inputs, by_kernel


_many_channels.defvjp(_many_channels_forward, _many_channels_backward)


def _tiles_fit(kernel, strides, padding) -> bool:
    """3x3, stride 1, equal padding on all sides."""
    even = len({side for pair in padding for side in pair}) == 1 and padding[0][0] <= 2
    return kernel.shape[:2] == (3, 3) and strides == (1, 1) and even


def _own_kernels(strides, padding) -> Callable:
    """XLA's convolution; where jobs with kernels of their own are mapped together, one by one.

    A grouped convolution is slow on a CPU.
    """

    @jax.custom_batching.custom_vmap
    def convolve(inputs, kernel):
        named = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            inputs, kernel, strides, padding, dimension_numbers=named
        )

    @convolve.def_vmap
    def several(size, batched, inputs, kernel):
        if batched[1]:
            whole = inputs if batched[0] else jnp.broadcast_to(inputs, (size, *inputs.shape))
            return jax.lax.map(lambda pair: convolve(*pair), (whole, kernel)), True
        together = convolve(inputs.reshape(-1, *inputs.shape[2:]), kernel)
        return together.reshape(size, -1, *together.shape[1:]), True

    return convolve


# --- folding ------------------------------------------------------------------------------------


def folded(
    inputs: jax.Array,
    kernel: jax.Array,
    padding: tuple[tuple[int, int], tuple[int, int]],
) -> jax.Array:
    """A convolution of stride 1 on images of a quarter of the size with four times the channels.

    Blocks of 2x2 pixels become channels, of inputs as of outputs. A 3x3 kernel becomes one of 2x2
    blocks, seven ninths more products, but in larger matrices and with half of the patches' memory:
    with few channels it is the memory that takes the time.

    Args:
      inputs: [b, height, width, channels].
      kernel: [rows, columns, channels, features].
      padding: of both sides.
    """
    channels, features = kernel.shape[2:]
    batch, *sides = inputs.shape[:3]
    outputs = [
        n + sum(pair) - size + 1
        for n, pair, size in zip(sides, padding, kernel.shape, strict=False)
    ]
    # In blocks: of the outputs, and of the kernel, moved by a pixel at most.
    rows, columns = (-(-n // 2) for n in outputs)
    down, right = (-(-(size + 1) // 2) for size in kernel.shape[:2])
    reach = (2 * (rows + down - 1), 2 * (columns + right - 1))
    # Never negative: reach is at least the padded side.
    ends = [r - n - low for r, n, (low, _) in zip(reach, sides, padding, strict=True)]
    pads = [(low, end) for (low, _), end in zip(padding, ends, strict=True)]
    padded = jnp.pad(inputs, ((0, 0), *pads, (0, 0)))
    blocks = _blocks_to_channels(padded)
    spare = (2 * down - kernel.shape[0], 2 * right - kernel.shape[1])

    def moved(i, j):
        return jnp.pad(kernel, ((i, spare[0] - i), (j, spare[1] - j), (0, 0), (0, 0)))

    # [2 down, 2 right, channels, 2, 2, features]
    by_row = [jnp.stack([moved(i, j) for j in range(2)], axis=3) for i in range(2)]
    places = jnp.stack(by_row, axis=3)
    large = _blocks_to_channels(places.reshape(1, *places.shape[:2], -1))
    large = large.reshape(down, right, 4 * channels, 4 * features)
    products = _plain("patches", blocks, large, (1, 1), ((0, 0), (0, 0)))
    grid = products.reshape(batch, rows, columns, 2, 2, features).swapaxes(2, 3)
    whole = grid.reshape(batch, 2 * rows, 2 * columns, features)
    return whole[:, : outputs[0], : outputs[1]]


def _blocks_to_channels(images: jax.Array) -> jax.Array:
    """[b, 2h, 2w, c] -> [b, h, w, 4c]."""
    batch, height, width, channels = images.shape
    grid = images.reshape(batch, height // 2, 2, width // 2, 2, channels).swapaxes(2, 3)
    return grid.reshape(batch, height // 2, width // 2, 4 * channels)


# --- Winograd's minimal filtering, F(2x2, 3x3) ---------------------------------------------------

# Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308, section 4:
# Y = A^T [(G g G^T) * (B^T d B)] A for 2x2 outputs from 4x4 inputs and a 3x3 kernel.
B_T = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
A_T = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])
TILE, SPAN = 2, 4


def winograd(inputs: jax.Array, kernel: jax.Array, padding: int) -> jax.Array:
    """A 3x3 convolution of stride 1 with 16 products for every 2x2 outputs instead of 36.

    Args:
      inputs: [b, height, width, channels].
      kernel: [3, 3, channels, features].
      padding: zeros on every side, at most 2.
    """
    batch, height, width, rows, columns = _geometry(inputs, padding)
    products = jnp.matmul(_input_tiles(inputs, padding), _kernel_tiles(kernel))
    grid = products.reshape(SPAN, SPAN, batch, rows, columns, kernel.shape[-1])
    tiles = _both_sides(A_T, grid)
    by_row = [jnp.stack(row, axis=3) for row in tiles]
    outputs = jnp.stack(by_row, axis=2).reshape(batch, TILE * rows, TILE * columns, -1)
    return outputs[:, :height, :width]


def winograd_kernel_gradient(inputs: jax.Array, gradient: jax.Array, padding: int) -> jax.Array:
    """What `winograd` does to its kernel's gradient: a product of tiles.

    Args:
      inputs: [b, height, width, channels].
      gradient: of the outputs, [b, height, width, features].
      padding: see `winograd`.
    """
    channels, features = inputs.shape[-1], gradient.shape[-1]
    batch, height, width, rows, columns = _geometry(inputs, padding)
    ends = (TILE * rows - height, TILE * columns - width)
    padded = jnp.pad(gradient, ((0, 0), (0, ends[0]), (0, ends[1]), (0, 0)))
    split = padded.reshape(batch, rows, TILE, columns, TILE, -1)
    grid = [[split[:, :, i, :, j] for j in range(TILE)] for i in range(TILE)]
    spread = _flat(_both_sides(A_T.T, grid), features)
    products = jnp.einsum("ntc,ntf->ncf", _input_tiles(inputs, padding), spread)
    by_kernel = _both_sides(G.T, products.reshape(SPAN, SPAN, channels, features))
    return jnp.stack([jnp.stack(row) for row in by_kernel])


def _geometry(inputs, padding) -> tuple[int, int, int, int, int]:
    """Batch, height and width of the outputs, rows and columns of tiles."""
    batch, height, width = inputs.shape[:3]
    height, width = height + 2 * padding - 2, width + 2 * padding - 2
    return batch, height, width, -(-height // TILE), -(-width // TILE)


def _input_tiles(inputs, padding) -> jax.Array:
    """B^T d B of all overlapping 4x4 tiles, [16, b * rows * columns, channels]."""
    height, width, channels = inputs.shape[1:]
    _, _, _, rows, columns = _geometry(inputs, padding)
    ends = (
        TILE * (rows + 1) - height - padding,
        TILE * (columns + 1) - width - padding,
    )
    padded = jnp.pad(inputs, ((0, 0), (padding, ends[0]), (padding, ends[1]), (0, 0)))
    # Neighbouring tiles share two rows: as blocks of two, every element is a plain slice.
    blocks = padded.reshape(-1, rows + 1, TILE, columns + 1, TILE, channels)

    def element(i, j):
        (down, row), (right, column) = divmod(i, TILE), divmod(j, TILE)
        return blocks[:, down : down + rows, row, right : right + columns, column]

    grid = [[element(i, j) for j in range(SPAN)] for i in range(SPAN)]
    return _flat(_both_sides(B_T, grid), channels)


def _kernel_tiles(kernel) -> jax.Array:
    """G g G^T, [16, channels, features]."""
    return jnp.stack(list(itertools.chain(*_both_sides(G, kernel))))


def _flat(grid, channels: int) -> jax.Array:
    return jnp.stack(list(itertools.chain(*grid))).reshape(SPAN * SPAN, -1, channels)


def _both_sides(matrix: np.ndarray, grid) -> list[list[jax.Array]]:
    """M g M^T for a grid of arrays: sums of few terms, written out."""
    rows, columns = len(grid), len(grid[0])
    half = [[_combine(row, [grid[r][c] for r in range(rows)]) for c in range(columns)]
            for row in matrix]  # fmt: skip
    return [[_combine(column, values) for column in matrix] for values in half]


def _combine(coefficients, terms) -> jax.Array:
    weighted = [
        term if c == 1 else -term if c == -1 else float(c) * term
        for c, term in zip(coefficients, terms, strict=True)
        if c != 0
    ]
    return sum(weighted[1:], weighted[0])
