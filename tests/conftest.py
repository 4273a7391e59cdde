"""Settings of all tests, made once before JAX is first used."""

import os
import tempfile

import pytest

# Programs that several tests share are compiled once, also by processes that tests start. The
# workers of pytest-xdist inherit the folder.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="fedrevive-test-programs-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

# Most of the time of the tests is compilation, half of it for speed, which no test measures.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")

import jax

# Shapes of different rank must be matched explicitly: silent broadcasting hides mistakes.
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield
