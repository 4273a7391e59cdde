"""Named random streams: every random act is addressed by what it is for, never by call order.

A draw is fully determined by (seed, stream, ids), where the ids say which client, job, visit or
version it belongs to. So results do not depend on how jobs are grouped into windows, on the number
of devices, or on where a run was interrupted.
"""

import enum

import numpy as np

# JAX's generator: the numbers of a run are its numbers, whatever JAX_DEFAULT_PRNG_IMPL says.
GENERATOR = "threefry2x32"


class Stream(enum.IntEnum):
    """What a random number is for. Values are part of the record of a run: never renumber them."""

    SPLIT = 1
    PARTITION = 2
    CLIENT_PROFILE = 3
    DURATION = 4
    CLIENT_CHOICE = 5
    BATCH_ORDER = 6
    MODEL_INIT = 7
    GENERATOR_INIT = 8
    AUGMENTATION = 9
    SERVER = 10
    FAULT = 11


def numpy_generator(seed: int, stream: Stream, *ids: int) -> np.random.Generator:
    """A NumPy generator for the act (seed, stream, ids)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, int(stream), *ids])))


def root_key(seed: int = 0):
    """The typed JAX key that all keys of a seed are folded from.

    Keys are made here alone, so that all are of one generator. Where only shapes are asked for,
    any seed serves.
    """
    import jax  # the schedule and the data use this module without JAX

    return jax.random.key(seed, impl=GENERATOR)


def jax_key(seed: int, stream: Stream, *ids):
    """A typed JAX key for the act (seed, stream, ids); the ids may be traced integers."""
    import jax

    key = jax.random.fold_in(root_key(seed), int(stream))
    for value in ids:
        key = jax.random.fold_in(key, value)
    return key
