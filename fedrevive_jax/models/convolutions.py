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

WAYS = ("lax", "patches", "shifted", "winograd")


def default() -> str:
    """What `auto` stands for on the backend at hand.

    CPU, two cores, batch 32, forward and backward inside a loop: winograd where it applies, patches
    elsewhere; 1846 ms a step of the ConvNet with lax, 54 with patches, 42 with winograd.
    Accelerators have fast convolutions of their own; with weights that differ from client to client
    they have not been measured.
    """
    return "winograd" if jax.default_backend() == "cpu" else "lax"


def choose(how: str) -> Callable:
    """A function with the signature of `lax.conv_general_dilated`, for NHWC images, HWIO kernels.

    Args:
      how: `lax`: XLA's convolution. `patches`: shifted slices side by side, times the kernel as one
        matrix. `shifted`: the sum of one matrix product for each place of the kernel; needs the
        least memory. `winograd`: F(2x2, 3x3), see `winograd`; patches where it does not apply or
        does not pay. `auto`: by the backend, see `default`.
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
    if how == "winograd":
        # Sums of rounded numbers would be rounded again: not in half precision.
        whole = inputs.dtype != jnp.bfloat16
        if whole and _winograd_pays(inputs.shape, kernel.shape, window_strides, padding):
            return winograd(inputs, kernel, padding[0][0])
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


# --- Winograd's minimal filtering, F(2x2, 3x3) ---------------------------------------------------

# Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308, section 4:
# Y = A^T [(G g G^T) * (B^T d B)] A for 2x2 outputs from 4x4 inputs and a 3x3 kernel.
B_T = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
A_T = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])
TILE, SPAN = 2, 4


def _winograd_pays(inputs, kernel, strides, padding) -> bool:
    """3x3, stride 1, equal padding on all sides, enough channels and tiles for the matrices."""
    square = kernel[:2] == (3, 3) and tuple(strides) == (1, 1)
    even = len({side for pair in padding for side in pair}) == 1 and padding[0][0] <= 2
    if not (square and even):
        return False
    outputs = min(inputs[1:3]) + 2 * padding[0][0] - 2
    return min(kernel[2:]) >= 32 and outputs >= 6


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def winograd(inputs: jax.Array, kernel: jax.Array, padding: int) -> jax.Array:
    """A 3x3 convolution of stride 1 with 16 products for every 2x2 outputs instead of 36.

    The derivatives are written out, because the transposes of overlapping tiles are slow sums: that
    of the inputs is a convolution of the same kind, that of the kernel a product of tiles.

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


def _winograd_forward(inputs, kernel, padding):
    return winograd(inputs, kernel, padding), (inputs, kernel)


def _winograd_backward(padding, saved, gradient):
    inputs, kernel = saved
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    inputs_gradient = winograd(gradient, turned, 2 - padding)

    batch, height, width, rows, columns = _geometry(inputs, padding)
    ends = (TILE * rows - height, TILE * columns - width)
    padded = jnp.pad(gradient, ((0, 0), (0, ends[0]), (0, ends[1]), (0, 0)))
    split = padded.reshape(batch, rows, TILE, columns, TILE, -1)
    grid = [[split[:, :, i, :, j] for j in range(TILE)] for i in range(TILE)]
    spread = _flat(_both_sides(A_T.T, grid), kernel.shape[-1])
    products = jnp.einsum("ntc,ntf->ncf", _input_tiles(inputs, padding), spread)
    kernel_gradient = _both_sides(G.T, products.reshape(SPAN, SPAN, *kernel.shape[2:]))
    return inputs_gradient, jnp.stack([jnp.stack(row) for row in kernel_gradient])


winograd.defvjp(_winograd_forward, _winograd_backward)


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
