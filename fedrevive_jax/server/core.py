"""The server core: hands out jobs, accepts uploads, makes versions. Knows no clock and no data.

The simulator drives it with a planned schedule; a live federation drives it with what arrives from
the network. The same sequence of calls gives the same model either way. Uploads enter at one place,
`Server.submit`, and none of them can make it raise or do harm to the global model's numbers.
"""

import math
from collections import deque
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedrevive_jax.compute import devices
from fedrevive_jax.compute.streams import Stream, jax_key
from fedrevive_jax.messages import Arrival, ClientPart, Download, Submission, Upload
from fedrevive_jax.methods import Method
from fedrevive_jax.models.model import Params, Taps
from fedrevive_jax.server.admission import (
    VERDICTS,
    Reason,
    Rejection,
    Rejections,
    described,
    judge,
    shown,
    whole_number,
)
from fedrevive_jax.server.client_cache import ClientCache, NoCache
from fedrevive_jax.server.shelf import ON_DEVICE, Shelf
from fedrevive_jax.server.version_store import VersionStore

# Uploads whose numbers are not told to the host yet are looked at after so many at the latest.
REVIEW_AFTER = 1000


class UnknownJobError(LookupError):
    """A job was given up that is not in flight."""


class UnknownClientError(LookupError):
    """A job was to be handed to a client that is not in the population."""


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
      accepted: bool [] on the device; False when the upload's numbers were rejected.
      verdict: int32 [] on the device, why, a place in `admission.VERDICTS`.
      update_norm: float32 [] on the device, ||theta' - theta_b||_2.
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
    verdict: jax.Array
    update_norm: jax.Array
    metrics: dict[str, jax.Array]


def make_step(
    method: Method,
    seed: int,
    max_update_norm: float,
    mesh: Mesh | None = None,
    platform: str | None = None,
) -> jax.stages.Wrapped:
    """Compiles all arithmetic of an arrival.

    Args:
      method, seed, max_update_norm: see `Server`.
      mesh, platform: see `devices.jit`.

    Returns:
      A jitted function (params, base, state, entry, upload, facts) -> (download, state, entry,
      (accepted, verdict, norm), metrics) that donates the state. `base` are the parameters of the
      version that the upload started from, `facts` are scalars in the order of `Arrival`.
    """

    def step(params, base, state, entry, upload, facts):
        arrival = Arrival(*facts)
        chex.assert_trees_all_equal_shapes_and_dtypes(upload.params, base, params)
        chex.assert_shape(facts, ())
        key = jax_key(seed, Stream.SERVER, arrival.job)
        accepted, verdict, norm = judge(upload, base, max_update_norm)
        submission = Submission(upload, arrival, base, params, accepted, key)
        params, state, entry, metrics = method.step(state, entry, submission)
        download = Download(params, method.extra(state))
        return download, state, entry, (accepted, verdict, norm), metrics

    # Parameters are never donated: the version store holds them.
    return devices.jit(mesh, step, platform, donate_argnums=2)


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
        *,
        num_clients: int,
        max_update_norm: float = 0.0,
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
          num_clients: N; clients are numbered 0..N-1.
          max_update_norm: the largest L2 norm of an update that is taken in; 0 is any finite one.

        Raises:
          ValueError: there is no client, or the norm is negative or not finite.
        """
        if num_clients < 1 or not 0 <= max_update_norm < math.inf:
            raise ValueError("need num_clients >= 1 and a finite max_update_norm >= 0")
        # What comes back from a shelf is bound to its device. All else is bound to it from the
        # start, so that one program does.
        params = shelf.fetch(devices.replicate(mesh, params))
        self._mesh, self._shelf = mesh, shelf
        self._method = method
        self._num_clients = num_clients
        self._max_update_norm = max_update_norm
        self._taps = taps
        self._report = method.client.report(jnp.zeros((1, 1), jnp.int32))
        self._extra_of = devices.jit(mesh, method.extra)
        self._state = shelf.fetch(devices.jit(mesh, method.init)(params))
        self._cache = NoCache() if cache is None else cache
        self._versions = VersionStore(0, self._sent(params), shelf)
        self._upload_shapes = described(self.upload_like())
        self._jobs: dict[int, Ticket] = {}
        self._next_job = 0
        self._buffered = 0
        self._rejections = Rejections()
        self._unreviewed: list[tuple[Ticket, jax.Array, jax.Array]] = []
        self._found: deque[Rejection] = deque(maxlen=REVIEW_AFTER)
        self._step = make_step(method, seed, max_update_norm, mesh)

    @property
    def version(self) -> int:
        """The newest global version."""
        return self._versions.newest

    @property
    def params(self) -> Params:
        """Parameters of the newest version."""
        return self.params_of(self.version)

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
    def rejected(self) -> dict[str, int]:
        """How many uploads were rejected, by reason; what the device found up to `review`."""
        return self._rejections.counts

    def params_of(self, version: int) -> Params:
        """Parameters of a live version.

        Raises:
          VersionNotFoundError: the version is gone.
        """
        return self.download_of(version).params

    def download_of(self, version: int) -> Download:
        """What a job that starts from a live version is handed.

        Raises:
          VersionNotFoundError: the version is gone.
        """
        return self._versions.get(version)

    @property
    def client_part(self) -> ClientPart:
        """What the method has its clients do beside their training."""
        return self._method.client

    def upload_like(self) -> Upload:
        """An upload of the right structure, shapes and dtypes."""
        return Upload(self.params, self._taps, jnp.zeros(()), self._report)

    def _sent(self, params: Params) -> Download:
        """The newest version as it is handed out, from the state that belongs to it."""
        return Download(params, self._shelf.fetch(self._extra_of(self._state)))

    def compile(self) -> jax.stages.Compiled:
        """Compiles the step for the uploads that will come; `submit` finds it compiled.

        It only reads, so that another thread may call it while jobs are dispatched and trained.
        """
        upload = self._shelf.fetch(devices.replicate(self._mesh, self.upload_like()))
        entry = self._shelf.fetch(self._cache.fetch(0))
        facts = (*(np.zeros((), np.int32) for _ in range(4)), np.zeros((), bool))
        start = self.params
        return self._step.lower(start, start, self._state, entry, upload, facts).compile()

    def dispatch(self, client: int) -> Ticket:
        """Hands a new job to a client; it starts from the newest version.

        Raises:
          UnknownClientError: the client is not a whole number in 0..N-1.
        """
        number = whole_number(client)
        if number is None or not 0 <= number < self._num_clients:
            raise UnknownClientError(
                f"client {shown(client)}: must be a whole number in 0..{self._num_clients - 1}"
            )
        ticket = Ticket(self._next_job, number, self.version)
        self._versions.acquire(ticket.version)
        self._jobs[ticket.job] = ticket
        self._next_job += 1
        return ticket

    def give_up(self, job: int) -> Ticket:
        """Ends a job whose upload is no longer waited for; one that still comes is rejected.

        Raises:
          UnknownJobError: the job is not in flight.
        """
        if job not in self._jobs:
            raise UnknownJobError(f"job {shown(job)} is not in flight")
        return self._end(self._jobs[job])

    def submit(
        self, job: int, upload: Upload | Any, base_version: int | None = None
    ) -> Receipt | Rejection:
        """Takes in the upload of a job and makes the next version when the buffer is full.

        An upload is only as good as its job: the version that it started from is what the server
        handed out, never what the client says. With `base_version` a client's claim is checked.

        The envelope is judged at once. An upload of a job that was never handed out or is over
        leaves no trace but a count. One that names a job in flight but has another version,
        structure, shape or dtype ends that job without a place in the buffer: its client may ask
        for a new job, which starts from a newer version, and cannot hold a slot and a stale version
        by sending the same again. The numbers are judged on the device. An upload that fails there
        ends its job, too, and takes its place in the buffer without moving anything, because the
        moments at which versions are made never depend on values.

        Args:
          job: the job's number, from its ticket.
          upload: whatever the client sent.
          base_version: the version that the client says it started from, if it says so.

        Returns:
          A receipt, whose `accepted` is known once the device is done; or the rejection.
        """
        ticket = self._check_envelope(job, upload, base_version)
        if isinstance(ticket, Rejection):
            return self._rejections.add(ticket)
        base = self.params_of(ticket.version)
        version = self.version
        completes = self._buffered + 1 == self._method.buffer_size
        # As arrays of NumPy, in the order of `Arrival`: the step traces them.
        numbers = (ticket.job, ticket.client, version, version - ticket.version)
        facts = (*(np.asarray(number, np.int32) for number in numbers), np.asarray(completes))
        entry = self._shelf.fetch(self._cache.fetch(ticket.client))
        download, self._state, entry, (accepted, verdict, norm), metrics = self._step(
            self.params, base, self._state, entry, upload, facts
        )
        self._cache.store(ticket.client, entry)
        self._buffered = 0 if completes else self._buffered + 1
        if completes:
            self._versions.put(version + 1, download)
        self._end(ticket)
        if len(self._unreviewed) == REVIEW_AFTER:
            self._judge_waiting()
        self._unreviewed.append((ticket, verdict, norm))
        return Receipt(
            ticket.job,
            ticket.client,
            ticket.version,
            version,
            version - ticket.version,
            self.version,
            upload.loss,
            accepted,
            verdict,
            norm,
            metrics,
        )

    def review(self, leave: int = 0) -> list[Rejection]:
        """Waits for what the device found in the uploads so far; counts and logs it.

        A live server calls it whenever it likes, a run once for every window.

        Args:
          leave: so many of the newest uploads, which the device may be busy with, wait for the next
            call.

        Returns:
          Those that were rejected since the last call; of very many the last ones.
        """
        self._judge_waiting(leave)
        found, self._found = list(self._found), deque(maxlen=REVIEW_AFTER)
        return found

    def _judge_waiting(self, leave: int = 0) -> None:
        done = len(self._unreviewed) - leave
        tickets = [ticket for ticket, *_ in self._unreviewed[:done]]
        found = jax.device_get([values for _, *values in self._unreviewed[:done]])
        self._unreviewed = self._unreviewed[done:]
        self._found += (
            self._rejections.add(Rejection(*ticket, reason, self._words(reason, float(norm))))
            for ticket, (verdict, norm) in zip(tickets, found, strict=True)
            if (reason := VERDICTS[verdict]) is not None
        )

    def _words(self, reason: Reason, norm: float) -> str:
        if reason is Reason.UPDATE_NORM:
            return f"update norm {norm:.6g} above max_update_norm={self._max_update_norm:g}"
        return "a number, or the norm of the update, is not finite"

    def _check_envelope(self, job: Any, upload: Any, base_version: Any) -> Ticket | Rejection:
        """Judges all but the numbers; ends the job of an upload that does not fit it."""
        number = whole_number(job)
        ticket = None if number is None else self._jobs.get(number)
        if ticket is None:
            if number is not None and 0 <= number < self._next_job:
                words = "was used already or given up"
                return Rejection(job, None, None, Reason.JOB_OVER, words)
            return Rejection(job, None, None, Reason.UNKNOWN_JOB, "was never handed out")
        if base_version is not None and whole_number(base_version) != ticket.version:
            self._end(ticket)
            words = f"says that it started from version {shown(base_version)}"
            return Rejection(*ticket, Reason.WRONG_VERSION, words)
        if described(upload) != self._upload_shapes:
            self._end(ticket)
            words = "its structure, shapes or dtypes are not the model's"
            return Rejection(*ticket, Reason.WRONG_SHAPE, words)
        return ticket

    def _end(self, ticket: Ticket) -> Ticket:
        del self._jobs[ticket.job]
        self._versions.release(ticket.version)
        return ticket

    def snapshot(self, exact: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
        """Everything a continuation needs: (plain record, pytree of arrays).

        Args:
          exact: keep the stale versions. Otherwise the jobs in flight are those of a server that
            has handed them out again, all from the newest version.
        """
        if not exact:
            record, arrays = self.snapshot()
            jobs = [[job, client, self.version] for job, client, _ in record["jobs"]]
            nothing = {"stale": {}, "extra": {}}
            return {**record, "jobs": jobs, "stale_versions": []}, {**arrays, **nothing}
        self._judge_waiting()
        record = {
            "version": self.version,
            "buffered": self._buffered,
            "next_job": self._next_job,
            "jobs": [list(ticket) for ticket in self._jobs.values()],
            "stale_versions": [v for v in self.live_versions if v != self.version],
            "rejected": self.rejected,
        }
        stored = {str(v): self._versions.stored(v) for v in record["stale_versions"]}
        return record, {
            "method": self._state,
            "cache": self._cache.snapshot(),
            "stale": {v: download.params for v, download in stored.items()},
            # That of the newest is told by the state.
            "extra": {v: download.extra for v, download in stored.items()},
        }

    def shapes(self, record: dict[str, Any]) -> dict[str, Any]:
        """The structure and shapes of a snapshot's arrays, told from its record."""
        params, extra = self.download_of(self.version)
        stale = [str(v) for v in record["stale_versions"]]
        shapes = jax.eval_shape(
            lambda: {
                "method": self._state,
                "stale": dict.fromkeys(stale, params),
                "extra": dict.fromkeys(stale, extra),
            }
        )
        return {**shapes, "cache": self._cache.shapes()}

    def restore(self, record: dict[str, Any], params: Params, arrays: dict[str, Any]) -> None:
        """Continues from a snapshot and the parameters of its newest version."""
        state = devices.replicate(self._mesh, (params, arrays["method"]))
        params, self._state = self._shelf.fetch(state)
        self._cache.restore(arrays["cache"])
        self._jobs = {ticket[0]: Ticket(*ticket) for ticket in record["jobs"]}
        self._next_job = record["next_job"]
        self._buffered = record["buffered"]
        self._rejections, self._unreviewed = Rejections(record["rejected"]), []
        self._found = deque(maxlen=REVIEW_AFTER)
        # One by one: on their way to the host they need not all fit on the device.
        stored = {
            int(v): self._shelf.store(
                devices.replicate(self._mesh, Download(tree, arrays["extra"][v]))
            )
            for v, tree in arrays["stale"].items()
        }
        stored[record["version"]] = self._sent(params)
        first, *later = sorted(stored)
        self._versions = VersionStore(first, stored[first], self._shelf)
        # References first: storing a newer version drops an older one that nobody refers to.
        for version in (first, *later):
            if version != first:
                self._versions.put(version, stored[version])
            for ticket in self._jobs.values():
                if ticket.version == version:
                    self._versions.acquire(version)
