"""The server core: hands out jobs, accepts uploads, makes versions. Knows no clock and no data.

The simulator drives it with a planned schedule; a live federation drives it with what arrives from
the network. The same sequence of calls gives the same model either way.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedrevive_jax import devices, trees
from fedrevive_jax.client_cache import ClientCache, NoCache
from fedrevive_jax.memory import ON_DEVICE, Shelf
from fedrevive_jax.messages import Arrival, Upload
from fedrevive_jax.methods import Method
from fedrevive_jax.models.model import Params, Taps
from fedrevive_jax.streams import Stream, jax_key
from fedrevive_jax.version_store import VersionStore


class UnknownJobError(LookupError):
    """An upload names a job that was never handed out or has been used already."""


class Ticket(NamedTuple):
    """A job that was handed out: its number, the client, and the version it starts from."""

    job: int
    client: int
    version: int


class Receipt(NamedTuple):
    """What became of an upload.

    Attributes:
      job, client, base_version: from its ticket.
      version: the newest version when it arrived.
      staleness: tau = version - base_version.
      new_version: the newest version now.
      loss: float32 [] on the device, the client's mean training loss.
      accepted: bool [] on the device; False when the upload held numbers that are not finite.
      metrics: float32 [] on the device by name, `beta` (the weight of Delta^KD) among them.
    """

    job: int
    client: int
    base_version: int
    version: int
    staleness: int
    new_version: int
    loss: jax.Array
    accepted: jax.Array
    metrics: dict[str, jax.Array]


class Server:
    """The global model, its live versions, the jobs in flight and the method's state.

    One owner calls `dispatch` and `submit` in turn; all arithmetic is in one compiled, pure step.
    """

    def __init__(
        self,
        method: Method,
        params: Params,
        taps: Taps,
        seed: int,
        mesh: Mesh | None = None,
        shelf: Shelf = ON_DEVICE,
        cache: ClientCache | None = None,
    ):
        """Starts at version 0.

        Args:
          method: what becomes of uploads.
          params: the initial global parameters.
          taps: feature statistics shaped like those of an upload, see `initial_taps`.
          seed: determines the method's random draws.
          mesh: devices that share the method's work; versions and state are the same on all.
          shelf: where stale versions wait.
          cache: what the method keeps of every client, see `client_cache.create`; None for a
            method that keeps nothing.
        """
        params = devices.replicate(mesh, params)
        self._mesh, self._shelf = mesh, shelf
        self._method = method
        self._upload_shapes = _shapes(Upload(params, taps, jnp.zeros(())))
        self._state = devices.jit(mesh, method.init)(params)
        self._cache = NoCache() if cache is None else cache
        self._versions = VersionStore(0, params, shelf)
        self._jobs: dict[int, Ticket] = {}
        self._next_job = 0
        self._buffered = 0
        self._traces = 0

        def step(params, base, state, entry, upload, arrival):
            self._traces += 1  # runs when traced, not when called
            key = jax_key(seed, Stream.SERVER, arrival.job)
            accepted = trees.all_finite(upload)
            params, state, entry, metrics = method.step(
                params, base, state, entry, upload, arrival, accepted, key
            )
            return params, state, entry, accepted, metrics

        # Parameters are never donated: the version store holds them.
        self._step = devices.jit(mesh, step, donate_argnums=2)

    @property
    def version(self) -> int:
        """The newest global version."""
        return self._versions.newest

    @property
    def params(self) -> Params:
        """Parameters of the newest version."""
        return self._versions.get(self.version)

    @property
    def live_versions(self) -> tuple[int, ...]:
        """Versions whose parameters are kept."""
        return self._versions.live

    @property
    def next_job(self) -> int:
        """Number of the next job that will be handed out."""
        return self._next_job

    @property
    def method_state(self) -> Any:
        """The method's state. Read it before the next `submit`, which donates it."""
        return self._state

    @property
    def traces(self) -> int:
        """How often the step was traced; more than once means it was compiled more than once."""
        return self._traces

    def params_of(self, version: int) -> Params:
        """Parameters of a live version.

        Raises:
          VersionNotFoundError: the version is gone.
        """
        return self._versions.get(version)

    def dispatch(self, client: int) -> Ticket:
        """Hands a new job to a client; it starts from the newest version."""
        ticket = Ticket(self._next_job, client, self.version)
        self._versions.acquire(ticket.version)
        self._jobs[ticket.job] = ticket
        self._next_job += 1
        return ticket

    def submit(self, job: int, upload: Upload) -> Receipt:
        """Accepts the upload of a job and makes the next version when the buffer is full.

        Raises:
          UnknownJobError: the job was never handed out, or its upload was submitted before.
          ValueError: the upload is not shaped like the model's.
        """
        ticket = self._jobs.get(job)
        if ticket is None:
            raise UnknownJobError(f"job {job} is not in flight")
        base = self._versions.get(ticket.version)
        if _shapes(upload) != self._upload_shapes:
            raise ValueError(f"the upload of job {job} is not shaped like the model's")

        version = self.version
        completes = self._buffered + 1 == self._method.buffer_size
        arrival = Arrival(
            job=np.asarray(job, np.int32),
            client=np.asarray(ticket.client, np.int32),
            version=np.asarray(version, np.int32),
            staleness=np.asarray(version - ticket.version, np.int32),
            completes=np.asarray(completes),
        )
        entry = self._cache.fetch(ticket.client)
        params, self._state, entry, accepted, metrics = self._step(
            self.params, base, self._state, entry, upload, arrival
        )
        self._cache.store(ticket.client, entry)
        del self._jobs[job]
        self._buffered = 0 if completes else self._buffered + 1
        if completes:
            self._versions.put(version + 1, params)
        self._versions.release(ticket.version)
        return Receipt(
            job,
            ticket.client,
            ticket.version,
            version,
            version - ticket.version,
            self.version,
            upload.loss,
            accepted,
            metrics,
        )

    def snapshot(self, exact: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
        """Everything a continuation needs: (plain record, pytree of arrays).

        Args:
          exact: keep the stale versions. Otherwise the jobs in flight are those of a server that
            has handed them out again, all from the newest version.
        """
        if not exact:
            record, arrays = self.snapshot()
            jobs = [[job, client, self.version] for job, client, _ in record["jobs"]]
            return {**record, "jobs": jobs, "stale_versions": []}, {**arrays, "stale": {}}
        record = {
            "version": self.version,
            "buffered": self._buffered,
            "next_job": self._next_job,
            "jobs": [list(ticket) for ticket in self._jobs.values()],
            "stale_versions": [v for v in self.live_versions if v != self.version],
        }
        return record, {
            "method": self._state,
            "cache": self._cache.snapshot(),
            "stale": {str(v): self._versions.stored(v) for v in record["stale_versions"]},
        }

    def shapes(self, record: dict[str, Any]) -> dict[str, Any]:
        """The structure and shapes of a snapshot's arrays, told from its record."""
        stale = {str(v): self.params for v in record["stale_versions"]}
        shapes = jax.eval_shape(lambda: {"method": self._state, "stale": stale})
        return {**shapes, "cache": self._cache.shapes()}

    def restore(self, record: dict[str, Any], params: Params, arrays: dict[str, Any]) -> None:
        """Continues from a snapshot and the parameters of its newest version."""
        params, self._state, stale = devices.replicate(
            self._mesh, (params, arrays["method"], arrays["stale"])
        )
        self._cache.restore(arrays["cache"])
        self._jobs = {ticket[0]: Ticket(*ticket) for ticket in record["jobs"]}
        self._next_job = record["next_job"]
        self._buffered = record["buffered"]
        stored = {int(v): tree for v, tree in stale.items()}
        stored[record["version"]] = params
        first, *later = sorted(stored)
        self._versions = VersionStore(first, stored[first], self._shelf)
        # References first: storing a newer version drops an older one that nobody refers to.
        for version in (first, *later):
            if version != first:
                self._versions.put(version, stored[version])
            for ticket in self._jobs.values():
                if ticket.version == version:
                    self._versions.acquire(version)


def _shapes(tree: Any) -> Any:
    """Structure, shapes and dtypes of a pytree, comparable."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]
