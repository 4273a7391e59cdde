"""Who has joined: which client number a node has, how often it has worked, and whom to leave alone.

A federation has N places. A node gets the lowest number that is free when it is first heard of, and
keeps it for good: what a method remembers of a client goes by that number.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

_LOG = logging.getLogger(__name__)
# A client that fails again and again is left alone for up to so many times the first rest.
LONGEST_REST = 32


@dataclass
class Client:
    """A client that has joined.

    Attributes:
      number: 0..N-1.
      visits: jobs that were handed to it.
      ready: whether it has prepared itself since it last failed.
      failures: one after the other.
      rests_until: when it may be spoken to again.
    """

    number: int
    visits: int = 0
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
    """The clients by node.

    Attributes:
      capacity: N.
      clients: by node.
    """

    capacity: int
    clients: dict[int, Client] = field(default_factory=dict)
    _turned_away: set[int] = field(default_factory=set)

    def meet(self, nodes: Iterable[int]) -> None:
        """Gives a number to nodes that have none, while there are any."""
        for node in sorted(nodes):
            if node in self.clients:
                continue
            if len(self.clients) < self.capacity:
                self.clients[node] = Client(len(self.clients))
                _LOG.info("node %d has joined as client %d", node, len(self.clients) - 1)
            elif node not in self._turned_away:
                self._turned_away.add(node)
                _LOG.warning(
                    "node %d is turned away: num_clients=%d have joined", node, self.capacity
                )

    def snapshot(self) -> list[list[Any]]:
        """What a continuation needs, plain: node as text, since JSON's numbers end below 2^64."""
        return [[str(node), own.number, own.visits] for node, own in self.clients.items()]

    def restore(self, kept: list[list[Any]]) -> None:
        self.clients = {int(node): Client(number, visits) for node, number, visits in kept}
