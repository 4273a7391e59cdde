"""Repeated timing, the count of compilations, memory, and what a device could do at most."""

import contextlib
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Dense matrix products at full rate, TFLOP/s, as the makers publish them: (float32 with the default
# precision of JAX, bfloat16). Found by a part of the device's name; others are measured.
PEAKS = {
    "H200": (494.0, 989.0),
    "H100": (494.0, 989.0),
    "A100": (156.0, 312.0),
    "TPU v4": (275.0, 275.0),
    "TPU v5 lite": (197.0, 197.0),
    "TPU v5p": (459.0, 459.0),
    "TPU v6 lite": (918.0, 918.0),
}


class Timing(NamedTuple):
    """Seconds of one call: the median of several, and half the distance between its quartiles."""

    median: float
    spread: float

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        if len(seconds) < 2:
            return cls(seconds[0], 0.0)
        lower, middle, upper = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(middle, (upper - lower) / 2)


def time_calls(call: Callable[[], Any], repeats: int) -> Timing:
    """Times calls whose results are waited for, after one that is not counted."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return Timing.of(seconds)


class Compilations:
    """Programs compiled, and the seconds that took.

    Attributes:
      count, seconds: so far.
    """

    def __init__(self):
        self.count, self.seconds = 0, 0.0

    def note(self, event: str, duration: float, **unused: Any) -> None:
        del unused
        if event == "/jax/core/compile/backend_compile_duration":
            self.count += 1
            self.seconds += duration


@contextlib.contextmanager
def compilations() -> Iterator[Compilations]:
    """Counts what is compiled within the block; programs that a cache on disk holds count too."""
    seen = Compilations()
    jax.monitoring.register_event_duration_secs_listener(seen.note)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(seen.note)


def live_bytes() -> int:
    """Bytes of all arrays that exist on the devices of this process."""
    return sum(array.nbytes for array in jax.live_arrays())


def peak_bytes() -> int:
    """The most memory used so far: of the device where it tells, else of this process."""
    told = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in told:
        return told["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_flops(precision: str) -> tuple[float, str]:
    """FLOP/s of the device at most, and where the number comes from.

    Args:
      precision: `float32` or `bfloat16`.
    """
    kind = jax.devices()[0].device_kind
    for name, (single, half) in PEAKS.items():
        if name in kind:
            return 1e12 * (half if precision == "bfloat16" else single), f"published for {name}"
    size = 2048
    matrix = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(precision))
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    best = time_calls(lambda: multiply(matrix, matrix), 9).median
    return 2 * size**3 / best, f"measured, a product of {size}x{size} matrices"
