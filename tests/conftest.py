"""Settings of all tests, made once before JAX is first used."""

import hashlib
import os
from pathlib import Path

import pytest

# Most of the time of the tests is compilation, most of that for speed, which no test measures.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_use_fusion_emitters=false",
)

# Programs are compiled once: for all workers, for processes that tests start, and for the next run
# of the tests. Those of another kind of processor have a folder of their own.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    from experiments.flags import processor

    kind = hashlib.sha256(processor().encode()).hexdigest()[:16]
    folder = Path(__file__).parent.parent / ".pytest_cache" / "programs" / kind
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax

# Shapes of different rank must be matched explicitly: silent broadcasting hides mistakes.
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield
