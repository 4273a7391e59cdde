"""Keeps K clients at work: orders out, replies in, whatever nodes and network do.

It knows neither Flower nor sockets, only a `Link`; and of time what its caller tells. It holds
K slots. Each is at every moment one of three: with a client, waiting for its cohort, or open. An
accepted or rejected upload sends its slot to the cohort; when `open_slots` wait there, they open
together. A job that fails opens its own slot at once. That is the clock's rule in a simulation.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax

from fedrevive_jax.compute.streams import Stream, numpy_generator
from fedrevive_jax.live import packing
from fedrevive_jax.live.link import PREPARE, TRAIN, Link, Message, Reply
from fedrevive_jax.live.registry import LONGEST_REST, Client, Registry
from fedrevive_jax.messages import Upload
from fedrevive_jax.server.admission import Rejection
from fedrevive_jax.server.core import Receipt, Server, Ticket

_LOG = logging.getLogger(__name__)


class Times(NamedTuple):
    """How long is waited, in seconds.

    Attributes:
      job: for the upload of a job.
      prepare: for a client that makes itself ready: it reads its data and compiles.
      rest: after the first failure of a client; twice as long after each further one.
    """

    job: float = 600.0
    prepare: float = 1200.0
    rest: float = 5.0


PATIENT = Times()


class Arrived(NamedTuple):
    """An upload that the server has taken in.

    Attributes:
      receipt: the server's.
      round_trip: seconds from the order to the reply.
      training: seconds of it in which the client trained, as it says; at most `round_trip`.
    """

    receipt: Receipt
    round_trip: float
    training: float


class _Flight(NamedTuple):
    """A message under way: to whom, since when, until when; the ticket, if it is of a job."""

    node: int
    sent: float
    due: float
    ticket: Ticket | None


def drawn(seed: int) -> Callable[[int, Sequence[int]], int]:
    """The choice of the client of a job: uniform among those that are free."""

    def choose(job: int, free: Sequence[int]) -> int:
        return int(numpy_generator(seed, Stream.CLIENT_CHOICE, job).choice(free))

    return choose


class Coordinator:
    """The jobs in flight between a server and the nodes of a link. One owner calls."""

    def __init__(
        self,
        server: Server,
        link: Link,
        registry: Registry,
        upload: Upload,
        preparation: Message,
        *,
        concurrency: int,
        open_slots: int,
        choose: Callable[[int, Sequence[int]], int],
        times: Times = PATIENT,
        believes_names: bool = False,
    ):
        """With all slots open.

        Args:
          server: takes uploads in.
          link: where the clients are.
          registry: who they are.
          upload: shapes of an upload, a template for what comes.
          preparation: what a client is told before its first job.
          concurrency, open_slots: see `Config`.
          choose: (job, numbers of free clients in ascending order) -> one of them.
          times: how long is waited.
          believes_names: a client is who it says it is, see `live.registry`.
        """
        self._believes_names = believes_names
        self._server, self._link, self._registry = server, link, registry
        self._upload, self._preparation = upload, preparation
        self._concurrency, self._open_slots = concurrency, open_slots
        self._choose, self._times = choose, times
        self._flights: dict[Hashable, _Flight] = {}
        self._replies: deque[Reply] = deque()
        self._open, self._cohort = concurrency, 0
        self._last: dict[int, Receipt] = {}
        self._packed: tuple[int, bytes] | None = None
        self.ignored = 0

    @property
    def jobs(self) -> dict[int, int]:
        """Jobs that are with a client: job -> node."""
        return {
            flight.ticket.job: flight.node
            for flight in self._flights.values()
            if flight.ticket is not None
        }

    @property
    def slots(self) -> tuple[int, int, int]:
        """(with a client, waiting for their cohort, open), K together."""
        return len(self.jobs), self._cohort, self._open

    def advance(self, now: float) -> Arrived | None:
        """Does all that can be done now, up to one upload that the server takes in.

        Args:
          now: seconds on a clock that never goes back.
        """
        nodes = set(self._link.nodes())
        self._registry.meet(nodes)
        self._registry.forget(nodes | {flight.node for flight in self._flights.values()})
        self._replies.extend(self._link.receive())
        self._give_up_what_is_late(now)
        arrived = None
        while arrived is None and self._replies:
            arrived = self._take(self._replies.popleft(), now)
        self._prepare(nodes, now)
        self._hand_out(nodes, now)
        return arrived

    def restore(self, cohort: int) -> None:
        """Continues where nothing is under way: with so many slots that wait, all others open."""
        self._cohort, self._open = cohort, self._concurrency - cohort

    def give_up(self) -> None:
        """Ends all jobs; what still comes of them is ignored."""
        for flight in list(self._flights):
            self._land(flight)

    def _land(self, name: Hashable) -> _Flight:
        """Ends a flight, and with it its job, whose slot opens."""
        flight = self._flights.pop(name)
        self._link.forget(name)
        if flight.ticket is not None:
            self._server.give_up(flight.ticket.job)
            self._open += 1
        return flight

    def _give_up_what_is_late(self, now: float) -> None:
        # What has come is taken, however late this is looked at.
        come = {reply.flight for reply in self._replies}
        late = [name for name, own in self._flights.items() if own.due < now and name not in come]
        for name in late:
            flight = self._land(name)
            self._blame(flight.node, now, "no reply in time")

    def _take(self, reply: Reply, now: float) -> Arrived | None:
        if reply.flight not in self._flights:
            self.ignored += 1  # a duplicate, or one that was given up
            return None
        flight = self._flights[reply.flight]
        if reply.message is None:
            self._land(reply.flight)
            self._blame(flight.node, now, reply.error or "no reason given")
            return None
        if flight.ticket is None:
            self._land(reply.flight)
            self._welcome(flight.node, reply.message.header, now)
            return None
        # Over before anything is made of the upload, whatever it is.
        del self._flights[reply.flight]
        job, header = flight.ticket.job, reply.message.header
        result = self._server.submit(job, self._unpacked(reply.message.body), header.get("version"))
        if isinstance(result, Rejection):
            self._open += 1
            self._blame(flight.node, now, result.detail)
            return None
        self._last[flight.node] = result
        self._cohort += 1
        if self._cohort == self._open_slots:
            self._open, self._cohort = self._open + self._cohort, 0
        took = now - flight.sent
        return Arrived(result, took, min(_seconds(header.get("seconds")), took))

    def _welcome(self, node: int, header: dict[str, Any], now: float) -> None:
        """A client is ready. If another node was the same client's before, that is over."""
        name = self._link.name(node)
        if self._believes_names:
            name = str(header.get("name", name))
        before = self._registry.sit(node, name)
        client = self._registry.clients[node]
        if before is None:
            client.failures = LONGEST_REST  # nothing will change soon
            client.rest(now, self._times.rest)
            return
        for flight in [key for key, own in self._flights.items() if own.node in before]:
            self._land(flight)
        for other in before:
            self._last.pop(other, None)
        client.ready = True

    def _unpacked(self, body: Any) -> Upload | None:
        """An upload on the device; None for what is none, which the server rejects."""
        try:
            return jax.device_put(packing.unpack(self._upload, body))
        except (TypeError, ValueError):
            return None

    def _blame(self, node: int, now: float, why: str) -> None:
        client = self._registry.clients[node]
        client.rest(now, self._times.rest)
        who = "a new client" if client.seat is None else f"client {client.seat.number}"
        rest = client.rests_until - now
        _LOG.warning("%s, node %d: %s; left alone for %.0f s", who, node, why, rest)

    def _idle(self, nodes: set[int], now: float) -> dict[int, Client]:
        """Clients that can be spoken to and have nothing to do."""
        busy = {flight.node for flight in self._flights.values()}
        return {
            node: client
            for node, client in self._registry.clients.items()
            if node in nodes and node not in busy and client.rests_until <= now
        }

    def _prepare(self, nodes: set[int], now: float) -> None:
        for node, client in self._idle(nodes, now).items():
            if not client.ready:
                self._send(node, self._preparation, now, self._times.prepare)

    def _hand_out(self, nodes: set[int], now: float) -> None:
        while self._open:
            ready = {
                client.seat.number: (node, client.seat)
                for node, client in self._idle(nodes, now).items()
                if client.ready and client.seat is not None and self._is_sound(node, now)
            }
            if not ready:
                return
            number = self._choose(self._server.next_job, sorted(ready))
            ticket = self._server.dispatch(number)
            node, seat = ready[number]
            header = {
                "job": ticket.job,
                "version": ticket.version,
                "visit": seat.visits,
                "settings": self._preparation.header["digest"],
            }
            message = Message(TRAIN, header, self._parameters(ticket.version))
            seat.visits += 1
            self._open -= 1
            if not self._send(node, message, now, self._times.job, ticket):
                self._server.give_up(ticket.job)
                self._open += 1

    def _is_sound(self, node: int, now: float) -> bool:
        """Whether the last upload of a client was taken in, which the device tells late."""
        last = self._last.pop(node, None)
        if last is None:
            return True
        if bool(last.accepted):
            self._registry.clients[node].failures = 0
            return True
        self._blame(node, now, "its upload was rejected by its numbers")
        return False

    def _send(
        self, node: int, message: Message, now: float, seconds: float, ticket: Ticket | None = None
    ) -> bool:
        flight = self._link.send(node, message, seconds)
        if flight is None:
            self._blame(node, now, "cannot be reached")
            return False
        assert flight not in self._flights, "a link never gives a name twice"
        self._flights[flight] = _Flight(node, now, now + seconds, ticket)
        return True

    def _parameters(self, version: int) -> bytes:
        """A version as it is sent; many jobs start from the same one."""
        if self._packed is None or self._packed[0] != version:
            self._packed = version, packing.pack(self._server.params_of(version))
        return self._packed[1]


def prepared(settings: str, digest: str, text: str = "") -> Message:
    """What a client is told before its first job.

    Args:
      settings: see `live.settings`.
      digest: tells these settings from others.
      text: the JSON of a tokenizer, for data sets of texts.
    """
    return Message(PREPARE, {"settings": settings, "digest": digest}, text.encode())


def _seconds(value: Any) -> float:
    """Seconds as a client says; 0 for what is no such number."""
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0
