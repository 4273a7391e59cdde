"""The contract of what can be run and recorded; nothing is done here."""

from typing import Any, Protocol

import numpy as np
from jax.sharding import Mesh

from fedrevive_jax.clients.evaluation import Evaluation
from fedrevive_jax.config import Config
from fedrevive_jax.data import Dataset
from fedrevive_jax.models import Model
from fedrevive_jax.models.model import Params
from fedrevive_jax.record.derived import Derived
from fedrevive_jax.server.core import Receipt, Server


class Runnable(Protocol):
    """What is run and recorded: a simulation, or a live federation.

    Attributes:
      config, dataset, model, origin, mesh, server, derived, fingerprint: see `Simulation`.
      settled: what was chosen for the devices at hand, plain.
      planned_arrivals: how many there will be; None where nobody knows.
      position: arrivals processed so far.
      finished: whether no more will come.
      now: when the last of them arrived, in simulated time or in seconds; 0 before the first.
      started: when its job was handed out.
      staleness: that of the arrivals so far, int [position].
      is_settled: whether fetching device results of all arrivals but the last does not keep the
        device waiting.
      jobs_restarted, step_seconds, bytes_sent: see `Simulation`.
      restarts_in_words: what became of jobs in flight where a run is not continued exactly.
      facts: what the summary says of this kind of run, plain.
    """

    @property
    def config(self) -> Config: ...
    @property
    def dataset(self) -> Dataset: ...
    @property
    def model(self) -> Model: ...
    @property
    def origin(self) -> dict[str, str]: ...
    @property
    def mesh(self) -> Mesh | None: ...
    @property
    def server(self) -> Server: ...
    @property
    def derived(self) -> Derived: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def settled(self) -> dict[str, Any]: ...
    @property
    def planned_arrivals(self) -> int | None: ...
    @property
    def position(self) -> int: ...
    @property
    def finished(self) -> bool: ...
    @property
    def now(self) -> float: ...
    @property
    def started(self) -> float: ...
    @property
    def staleness(self) -> np.ndarray: ...
    @property
    def is_settled(self) -> bool: ...
    @property
    def jobs_restarted(self) -> int: ...
    @property
    def restarts_in_words(self) -> str: ...
    @property
    def step_seconds(self) -> list[float]: ...
    @property
    def bytes_sent(self) -> int: ...
    @property
    def facts(self) -> dict[str, Any]: ...

    def advance(self) -> Receipt | None:
        """Processes the next arrival; None where none has come for a while."""
        ...

    def is_first_after(self, interval: float, version: int) -> bool:
        """Whether a version that was just made is the first since a multiple of an interval."""
        ...

    def evaluate(self) -> Evaluation:
        """Evaluates the newest version on the configured split."""
        ...

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Everything a continuation needs: (plain record, pytree of arrays)."""
        ...

    def check(self, record: dict[str, Any]) -> None:
        """Whether a snapshot is one of this run, or a `ConfigError`."""
        ...

    def shapes(self, record: dict[str, Any]) -> dict[str, Any]:
        """The structure and shapes of a snapshot's arrays, told from its record."""
        ...

    def restore(self, record: dict[str, Any], params: Params, arrays: dict[str, Any]) -> None:
        """Continues from a snapshot and the parameters of its newest version."""
        ...
