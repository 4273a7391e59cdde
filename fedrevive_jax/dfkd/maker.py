"""What synthesis optimises and how it is judged: the part in which images and text differ."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fedrevive_jax.models.model import Params, Taps


class Maker(NamedTuple):
    """Pure functions that make samples from learned parameters and per-sample latents.

    Attributes:
      init: key -> omega, the persistent parameters that the meta-step learns.
      draw: (key, key, targets int [b], frozen) -> (latents, condition): the pytree that a synthesis
        optimises beside its fast copy of omega, and one that it does not.
      make: (parameters, latents, condition) -> samples, a pytree of arrays [b, ...].
      distance: (activations of a teacher, statistics of its client) -> L_feat's distance, [].
    """

    init: Callable[[jax.Array], Params]
    draw: Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[Any, Any]]
    make: Callable[[Params, Any, Any], Any]
    distance: Callable[[tuple[jax.Array, ...], Taps], jax.Array]
