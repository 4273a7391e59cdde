"""JAX's own settings: those that would change a run's numbers, or break it, are refused.

JAX takes them from environment variables, such as JAX_ENABLE_X64, and from `jax.config`. No record
of a run holds them, so no run may depend on them.
"""

from typing import NamedTuple

import flax
import jax

from fedrevive_jax.errors import ConfigError


class _Setting(NamedTuple):
    """A setting's name, what it may be, its default first, and why."""

    name: str
    allowed: tuple[object, ...]
    reason: str


_DRAWS = "it changes the random numbers of a run, and no record tells"
_NANS = "NaN stands for numbers that do not apply, and in uploads it is what is watched for"
_SETTINGS = (
    _Setting("jax_enable_x64", (False,), "runs are in float32"),
    _Setting("jax_threefry_partitionable", (True,), _DRAWS),
    _Setting("jax_random_seed_offset", (0,), _DRAWS + "; `seed` is there for that"),
    _Setting("jax_high_dynamic_range_gumbel", (False,), _DRAWS),
    _Setting("flax_fix_rng_separator", (False,), _DRAWS),
    _Setting("flax_return_frozendict", (False,), "checkpoints hold plain dicts"),
    _Setting("jax_default_matmul_precision", (None,), "`precision` says how models compute"),
    _Setting("jax_numpy_dtype_promotion", ("standard",), "the package relies on promotion"),
    _Setting("jax_debug_nans", (False,), _NANS),
    _Setting("jax_debug_infs", (False,), _NANS),
    _Setting("jax_disable_jit", (False,), "runs are made of compiled programs"),
    _Setting(
        "jax_transfer_guard",
        ("allow", None, "log", "log_explicit"),
        "runs feed the device as they go",
    ),
)


def check() -> None:
    """Looks at JAX's settings, and for its devices; to be called before anything is computed.

    Processes that compute together have to join before.

    Raises:
      ConfigError: a setting would change the numbers of a run or break it, or there is no device of
        the platform that is asked for.
    """
    for name, allowed, reason in _SETTINGS:
        settings = flax.config if name.startswith("flax") else jax.config
        value = getattr(settings, name, allowed[0])  # a version that has no such setting
        if value not in allowed:
            raise ConfigError(name.upper(), value, f"must be left out or {allowed[0]}; {reason}")
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = getattr(jax.config, "jax_platforms", None)
        told = str(error).splitlines()[0] if str(error) else "JAX finds no such device"
        raise ConfigError("JAX_PLATFORMS", asked or "", told) from None
