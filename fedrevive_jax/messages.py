"""What passes between a client, the server core and a method."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedrevive_jax.models.model import Params, Taps


class Upload(NamedTuple):
    """What a client sends back.

    Attributes:
      params: its parameters after local training (theta'), a pytree.
      taps: running feature statistics ((mean, variance), ...) of its own data.
      loss: mean training loss over its local steps, float32 [].
    """

    params: Params
    taps: Taps
    loss: jax.Array


class Arrival(NamedTuple):
    """What the server core knows of an upload when it accepts it; all int32 [] or bool [].

    Attributes:
      job: number of the job, unique in a run.
      client: who sent it.
      version: v, the newest global version.
      staleness: tau = v - the version the job started from.
      completes: whether it is the B-th of its buffer, so that a new version is due.
    """

    job: jax.Array
    client: jax.Array
    version: jax.Array
    staleness: jax.Array
    completes: jax.Array


class Submission(NamedTuple):
    """An upload as a method sees it, inside the compiled step.

    Attributes:
      upload: what was sent.
      arrival: who sent it, and when.
      base: theta_b, the parameters that its job started from.
      params: theta, the global parameters at the arrival.
      accepted: bool [], whether the server core found the upload sound. Otherwise it must leave no
        trace but the place it takes in the buffer.
      key: for the method's random draws at this arrival.
    """

    upload: Upload
    arrival: Arrival
    base: Params
    params: Params
    accepted: jax.Array
    key: jax.Array

    @property
    def delta(self) -> Params:
        """Delta = theta' - theta_b."""
        return jax.tree.map(jnp.subtract, self.upload.params, self.base)
