"""Repeated timing, the count of compilations, memory, and what a device could do at most."""

import contextlib
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedrevive_jax.compute import chips


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
    return time_in_turn([call], repeats)[0]


def time_in_turn(calls: Sequence[Callable[[], Any]], repeats: int) -> list[Timing]:
    """Times several kinds of calls, one of each after the other, so that what slows a machine down
    for a while slows all of them. Results are waited for; the first round is not counted."""
    seconds: list[list[float]] = [[] for _ in calls]
    for round_ in range(repeats + 1):
        for call, own in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())
            if round_:
                own.append(time.perf_counter() - start)
    return [Timing.of(own) for own in seconds]


class Compilations:
    """Programs compiled, and the seconds that took.

    Attributes:
      count, seconds: so far.
    """

    def __init__(self):
        self.count, self.seconds = 0, 0.0

    def note(self, event: str, duration_secs: float, **unused: Any) -> None:
        del unused
        if event == "/jax/core/compile/backend_compile_duration":
            self.count += 1
            self.seconds += duration_secs


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
    if kind in chips.CHIPS:
        return chips.peak(chips.CHIPS[kind], precision), f"published for {kind}"
    # On an accelerator so many in one call that handing it over does not count.
    size, count = (2048, 1) if jax.default_backend() == "cpu" else (8192, 20)
    return measured_flops(precision, size, count), f"measured, products of {size}x{size} matrices"


def measured_flops(precision: str, size: int, count: int) -> float:
    """FLOP/s of products of square matrices, one after the other, the median of several calls.

    Args:
      precision: `float32` or `bfloat16`.
      size: rows of a matrix.
      count: products in one call.
    """
    dtype = jnp.dtype(precision)
    # Scaled, so that the entries of a product are as large as those of its factors.
    matrix = (jax.random.normal(jax.random.key(0), (size, size)) / size**0.5).astype(dtype)

    @jax.jit
    def multiply(a):
        b = a
        for _ in range(count):
            b = jnp.matmul(a, b, precision="highest", preferred_element_type=jnp.float32)
            b = b.astype(dtype)
        return b

    return count * 2 * size**3 / time_calls(lambda: multiply(matrix), 9).median
