"""How much room arrays take in the memory of a TPU.

It keeps them in tiles of 8 rows of 128 numbers, or of 1, 2 or 4 rows where there are no more; what
does not fill its last tile is padded. The compiler chooses which two axes the tiles cover. Counted
are those that leave the least empty; it was seen to choose others for bytes [n, 28, 28, 1], a
seventh larger. An array of one axis lies in tiles of up to 1024 numbers. All of this is read from
what the compiler of libtpu 0.0.42 says of arguments.
"""

import itertools
import math
from typing import Any

import jax

from fedrevive_jax.compute import trees

LANES, ROWS = 128, 8


def nbytes(tree: Any, platform: str) -> int:
    """Size of all arrays on a device, or of what `jax.eval_shape` tells of them.

    Args:
      tree: the arrays.
      platform: JAX's name of the kind of device; one other than a TPU pads nothing.
    """
    if platform != "tpu":
        return trees.nbytes(tree)
    return sum(_numbers(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _numbers(shape: tuple[int, ...]) -> int:
    """How many numbers there is room for in the tiles of an array."""
    if 0 in shape:
        return 0
    if len(shape) < 2:
        numbers = math.prod(shape)
        return _up(numbers, min(LANES * _power(-(-numbers // LANES)), LANES * ROWS))
    return min(
        _up(shape[across], LANES)
        * _up(shape[down], min(_power(shape[down]), ROWS))
        * (math.prod(shape) // (shape[across] * shape[down]))
        for across, down in itertools.permutations(range(len(shape)), 2)
    )


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _power(number: int) -> int:
    """The smallest power of two that is not below."""
    return 1 << (number - 1).bit_length()
