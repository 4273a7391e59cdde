"""The room of arrays in tiles: worked by hand, and as the compiler of a TPU lays them out."""

import jax
import jax.numpy as jnp
import pytest

from fedrevive_jax.compute import target as targets
from fedrevive_jax.compute import tiles

SHAPES = [
    ((), 128),
    ((10,), 128),
    ((129,), 256),  # two tiles of 128
    ((1500,), 2048),  # two of 1024
    ((64, 64), 64 * 128),
    ((3, 64), 4 * 128),  # tiles of four rows
    ((5, 64), 8 * 128),
    ((512, 10), 16 * 512),  # turned: ten rows of 512
    ((3, 3, 3, 64), 9 * 4 * 128),
    ((5, 5, 1, 32), 25 * 128),
    ((129, 512), 136 * 512),
    ((32, 8, 129, 129), 32 * 129 * 8 * 256),  # rows across the heads
]


@pytest.mark.parametrize(("shape", "numbers"), SHAPES)
def test_room_by_hand(shape, numbers):
    array = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert tiles.nbytes({"a": array}, "tpu") == 4 * numbers
    assert tiles.nbytes(array.update(dtype=jnp.bfloat16), "tpu") == 2 * numbers
    assert tiles.nbytes(array, "gpu") == 4 * array.size
    assert tiles.nbytes(jax.ShapeDtypeStruct((0, *shape), jnp.float32), "tpu") == 0


@pytest.mark.skipif(not targets.has_compiler(), reason="python -m pip install -e '.[tpu]'")
@pytest.mark.parametrize(("shape", "numbers"), SHAPES)
def test_room_by_the_compiler(shape, numbers):
    array = targets.described("v5e:1x1").shapes(jax.ShapeDtypeStruct(shape, jnp.float32))
    compiled = jax.jit(lambda x: x.sum()).lower(array).compile()
    assert compiled.memory_analysis().argument_size_in_bytes == 4 * numbers
