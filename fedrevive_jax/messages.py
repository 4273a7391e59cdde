"""What passes between a client, the server core and a method."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedrevive_jax.models.model import Params, Taps


class Download(NamedTuple):
    """What a client starts from: a version, as it is handed out.

    Attributes:
      params: its parameters (theta_b), a pytree.
      extra: what the method sends with it, a pytree; () for most.
    """

    params: Params
    extra: Any = ()


class Upload(NamedTuple):
    """What a client sends back.

    Attributes:
      params: its parameters after local training (theta'), a pytree.
      taps: running feature statistics ((mean, variance), ...) of its own data.
      loss: mean training loss over its local steps, float32 [].
      extra: what the method asks of it, a pytree of float arrays; () for most.
    """

    params: Params
    taps: Taps
    loss: jax.Array
    extra: Any = ()


class ClientPart(NamedTuple):
    """What a method has its clients do beside their training. By default nothing.

    Attributes:
      term: (params, logits [b, classes], labels int [b], extra, step, key) -> float32 [], what is
        added to the loss of a local step, pure. `params` are those under training, `logits` theirs
        of the step's samples, `extra` is that of the job's `Download`, `step` int32 [] counts from
        0. The loss that is uploaded is that of the samples alone.
      report: (labels int [steps, b] of all samples of a job) -> `Upload.extra`, pure; its shapes
        depend neither on the steps nor on b.
    """

    term: Callable[[Params, jax.Array, jax.Array, Any, jax.Array, jax.Array], jax.Array] | None = (
        None
    )
    report: Callable[[jax.Array], Any] = lambda labels: ()


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
