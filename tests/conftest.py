"""Settings of all tests, made once before JAX is first used."""

import jax
import pytest

# Shapes of different rank must be matched explicitly: silent broadcasting hides mistakes.
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield
