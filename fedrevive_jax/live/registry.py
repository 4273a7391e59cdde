"""Who has joined: which client number is whose, how often it has worked, and whom to leave alone.

A federation has N seats, numbered 0..N-1. A client gets the lowest that is free when it has first
made itself ready, and keeps it for good: what a method remembers of a client goes by that number.
Whose seat it is goes by a name. Where nodes have registered keys, the key is the name. Where they
have none, on one machine, a node that is started again is another one, so that its client's own
name is believed.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

_LOG = logging.getLogger(__name__)
# A client that fails again and again is left alone for up to so many times the first rest.
LONGEST_REST = 32
LONGEST_NAME = 100


@dataclass
class Seat:
    """A client's place: its number, and the jobs that were handed to it."""

    number: int
    visits: int = 0


@dataclass
class Client:
    """A node, and the client behind it.

    Attributes:
      seat: once it has been ready.
      ready: whether it has made itself ready since it last failed.
      failures: one after the other.
      rests_until: when it may be spoken to again.
    """

    seat: Seat | None = None
    ready: bool = False
    failures: int = 0
    rests_until: float = 0.0

    def rest(self, now: float, seconds: float) -> None:
        """After a failure: twice as long each time."""
        self.ready = False
        self.rests_until = now + seconds * min(2**self.failures, LONGEST_REST)
        self.failures += 1


@dataclass
class Registry:
    """Seats by name, clients by node.

    Attributes:
      capacity: N.
      seats: by name.
      clients: by node.
    """

    capacity: int
    seats: dict[str, Seat] = field(default_factory=dict)
    clients: dict[int, Client] = field(default_factory=dict)

    def meet(self, nodes: Iterable[int]) -> None:
        """Takes note of nodes that are new."""
        for node in nodes:
            self.clients.setdefault(node, Client())

    def forget(self, known: set[int]) -> None:
        """Drops nodes without a seat that are not among those that are known of."""
        for node in [n for n, own in self.clients.items() if own.seat is None and n not in known]:
            del self.clients[node]

    def sit(self, node: int, name: str) -> list[int] | None:
        """Gives a node the seat of a name, a new one if there are any.

        Returns:
          Nodes that had that seat before, and have none now; None: all seats are taken.
        """
        seat = self.seats.get(name)
        if seat is None:
            if len(name) > LONGEST_NAME:
                _LOG.warning("node %d is turned away: its name is too long", node)
                return None
            if len(self.seats) == self.capacity:
                _LOG.warning(
                    "node %d is turned away: num_clients=%d have joined", node, self.capacity
                )
                return None
            seat = self.seats[name] = Seat(len(self.seats))
            _LOG.info("node %d has joined as client %d", node, seat.number)
        before = [
            other for other, own in self.clients.items() if own.seat is seat and other != node
        ]
        for other in before:
            del self.clients[other]
        self.clients[node].seat = seat
        return before

    def snapshot(self) -> dict[str, list[int]]:
        """What a continuation needs, plain: name -> number, jobs."""
        return {name: [seat.number, seat.visits] for name, seat in self.seats.items()}

    def restore(self, kept: dict[str, Any]) -> None:
        self.seats = {name: Seat(number, visits) for name, (number, visits) in kept.items()}
        self.clients = {}
