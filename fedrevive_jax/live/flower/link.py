"""Flower's Grid as a `Link`."""

import hashlib
import logging
import time
from collections.abc import Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import flwr.app
import httpx
from flwr.serverapp import Grid

from fedrevive_jax.errors import one_line
from fedrevive_jax.live.flower.records import from_record, to_record
from fedrevive_jax.live.link import PREPARE, Message, Reply

_LOG = logging.getLogger(__name__)
# How often a flight is asked for, and how many at once. A reply whose sender is slow to upload it
# holds up the call that asks for it, so that each is asked for alone.
POLL, PULLERS = 0.3, 256
# How long a list of nodes is believed.
NODES_FOR = 1.0


class GridLink:
    """A link over a Grid. One owner calls; replies are pulled by threads."""

    def __init__(self, grid: Grid):
        self._grid = grid
        self._pool = ThreadPoolExecutor(PULLERS, "pull")
        self._next: dict[str, float] = {}
        self._pulling: dict[str, Future[list[Reply]]] = {}
        self._listed = -1e9
        self._nodes: dict[int, str] = {}

    def nodes(self) -> Iterable[int]:
        if time.monotonic() - self._listed > NODES_FOR:
            self._nodes = {node.node_id: _name(node) for node in self._grid.get_nodes()}
            self._listed = time.monotonic()
        return self._nodes

    def name(self, node: int) -> str:
        return self._nodes.get(node, str(node))

    def send(self, node: int, message: Message, seconds: float) -> Hashable | None:
        kind = flwr.app.MessageType.QUERY if message.kind == PREPARE else flwr.app.MessageType.TRAIN
        sent = flwr.app.Message(to_record(message), node, kind, ttl=seconds)
        # In the place of a message that it refuses a Grid gives nothing, None or an empty name.
        given = list(self._grid.push_messages([sent]))
        if not given or not given[0]:
            return None
        self._next[given[0]] = time.monotonic() + POLL
        return given[0]

    def receive(self) -> list[Reply]:
        now = time.monotonic()
        for flight, due in self._next.items():
            if due <= now and flight not in self._pulling:
                self._pulling[flight] = self._pool.submit(self._pull, flight)
        replies = []
        for flight in [name for name, own in self._pulling.items() if own.done()]:
            pulled = self._pulling.pop(flight)
            if flight not in self._next or pulled.cancelled():
                continue  # given up meanwhile
            try:
                found = pulled.result()
            except (OSError, httpx.HTTPError) as error:
                _LOG.warning("a reply could not be asked for: %s", error)
                found = []
            except Exception as error:  # what came is nothing that Flower can read
                found = [Reply(flight, None, one_line(repr(error)))]
            if found:
                del self._next[flight]
                replies += found
            else:
                self._next[flight] = now + POLL
        return replies

    def forget(self, flight: Hashable) -> None:
        self._next.pop(str(flight), None)
        if str(flight) in self._pulling:
            self._pulling[str(flight)].cancel()

    def close(self) -> None:
        """Ends the threads; a pull under way is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _pull(self, flight: str) -> list[Reply]:
        """The reply of a flight, if it has come: at most one, and only its own."""
        for message in self._grid.pull_messages([flight]):
            if message.metadata.reply_to_message_id != flight:
                continue
            if message.has_error():
                return [Reply(flight, None, one_line(message.error.reason or "no reason given"))]
            try:
                return [Reply(flight, from_record(message.content))]
            except ValueError as error:
                return [Reply(flight, None, str(error))]
        return []


def _name(node: Any) -> str:
    """A node's key in short; its number where it has none."""
    key = bytes(getattr(node, "public_key", b""))
    return hashlib.sha256(key).hexdigest()[:32] if key else str(node.node_id)
