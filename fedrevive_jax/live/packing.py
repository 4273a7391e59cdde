"""Arrays as one block of bytes, and back against the receiver's own template.

Nothing that comes over a network says what shape it has: the receiver knows, and refuses all else.
"""

import math
from typing import Any

import jax
import numpy as np


def size(template: Any) -> int:
    """Bytes of a packed pytree that is shaped like the template."""
    return sum(
        math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(template)
    )


def pack(tree: Any) -> bytes:
    """All leaves of a pytree of arrays one after the other, little-endian, in JAX's order."""
    arrays = jax.device_get(jax.tree.leaves(tree))
    return b"".join(
        np.ascontiguousarray(array, np.asarray(array).dtype.newbyteorder("<")).tobytes()
        for array in arrays
    )


def unpack(template: Any, block: bytes) -> Any:
    """A pytree of NumPy arrays with the template's structure, shapes and dtypes.

    Args:
      template: a pytree of arrays, or of `jax.ShapeDtypeStruct`s.
      block: what `pack` made of a tree like it.

    Raises:
      ValueError: the block has another size.
    """
    leaves, structure = jax.tree.flatten(template)
    if len(block) != size(template):
        raise ValueError(f"{len(block)} bytes, must be {size(template)}")
    arrays, start = [], 0
    for leaf in leaves:
        dtype = np.dtype(leaf.dtype)
        count = math.prod(leaf.shape)
        values = np.frombuffer(block, dtype.newbyteorder("<"), count, start)
        # A copy: of its own, in the machine's own order of bytes, and aligned.
        arrays.append(values.astype(dtype).reshape(leaf.shape))
        start += count * dtype.itemsize
    return jax.tree.unflatten(structure, arrays)
