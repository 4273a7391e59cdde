"""Which uploads are taken in, and what is said of those that are not.

What a client controls never raises: a bad upload is rejected with a reason, counted and logged.
Two gates decide. The host looks at the envelope before anything changes: whose job it is, and
structure, shapes and dtypes. The device looks at the numbers inside the compiled step, so that no
arrival waits for it; what it found is told when it is fetched, see `Server.review`.
"""

import enum
import logging
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedrevive_jax.compute import trees
from fedrevive_jax.messages import Upload
from fedrevive_jax.models.model import Params

_LOG = logging.getLogger(__name__)


class Reason(enum.StrEnum):
    """Why an upload was rejected; the values stand in the record of a run."""

    UNKNOWN_JOB = "unknown_job"
    JOB_OVER = "job_over"
    WRONG_VERSION = "wrong_version"
    WRONG_SHAPE = "wrong_shape"
    NOT_FINITE = "not_finite"
    UPDATE_NORM = "update_norm"


# What the device can find, by the number it tells.
VERDICTS = (None, Reason.NOT_FINITE, Reason.UPDATE_NORM)


class Rejection(NamedTuple):
    """An upload that was rejected.

    Attributes:
      job: the job that it named, as it came.
      client, base_version: from the job's ticket; None where it names no job in flight.
      reason: why.
      detail: the same in words, one line.
    """

    job: Any
    client: int | None
    base_version: int | None
    reason: Reason
    detail: str


class Rejections:
    """Counts rejected uploads by reason and logs a line for each."""

    def __init__(self, counts: dict[str, int] | None = None):
        self._counts = Counter({Reason(name): count for name, count in (counts or {}).items()})

    @property
    def counts(self) -> dict[str, int]:
        """How many were rejected, by reason."""
        return {str(reason): self._counts[reason] for reason in Reason if self._counts[reason]}

    def add(self, rejection: Rejection) -> Rejection:
        self._counts[rejection.reason] += 1
        job, client, version, reason, detail = rejection
        who = "" if client is None else f" from client {client}, version {version}"
        _LOG.warning("rejected an upload for job %s%s: %s (%s)", shown(job), who, reason, detail)
        return rejection


def judge(
    upload: Upload, base: Params, max_update_norm: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the numbers of an upload are worth; pure, on the device.

    An update whose squared norm is beyond float32 counts as not finite: no number of accepted ones
    can make the global model overflow then, at any sensible rate.

    Args:
      upload: as it came, in the right shapes.
      base: the parameters that its job started from.
      max_update_norm: the largest norm; 0 is any finite one.

    Returns:
      (accepted bool [], its place in `VERDICTS` int32 [], ||theta' - theta_b||_2 float32 []).
    """
    delta = jax.tree.map(lambda new, old: (new - old).astype(jnp.float32), upload.params, base)
    square = optax.tree.norm(delta, squared=True)
    norm = jnp.sqrt(square)
    finite = trees.all_finite((upload.taps, upload.loss, square, upload.extra))
    small = norm <= max_update_norm if max_update_norm else jnp.asarray(True)
    verdict = jnp.where(~finite, 1, jnp.where(small, 0, 2)).astype(jnp.int32)
    return verdict == 0, verdict, norm


def whole_number(value: Any) -> int | None:
    """An int or a NumPy integer as an int; None for all else, also for truth values."""
    try:
        return None if isinstance(value, bool) else value.__index__()
    except (AttributeError, TypeError, ValueError):
        return None


def described(tree: Any) -> Any:
    """Structure, shapes and dtypes of a pytree of arrays, comparable; None if it is none."""
    try:
        leaves, structure = jax.tree.flatten(tree)
        return structure, [(tuple(leaf.shape), jnp.dtype(leaf.dtype)) for leaf in leaves]
    except Exception:  # whatever the tree that a client made up does to JAX's walk through it
        return None


def shown(value: Any, limit: int = 60) -> str:
    """A value that a client sent, in one line of bounded length."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # of a number of many digits, of deep nesting
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else text[:limit] + "..."
