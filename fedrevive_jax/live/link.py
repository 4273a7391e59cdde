"""What the coordinator needs of a network: nodes that come and go, orders to them, their replies.

Flower is one link, see `live.flower`; tests have another that loses and repeats what it likes.
"""

from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple, Protocol

# What a client is asked for.
PREPARE, TRAIN = "prepare", "train"


class Message(NamedTuple):
    """What goes between server and client.

    Attributes:
      kind: `PREPARE` or `TRAIN`.
      header: plain values, for JSON.
      body: numbers as `live.packing` packs them, or a text.
    """

    kind: str
    header: dict[str, Any]
    body: bytes = b""


class Reply(NamedTuple):
    """What became of a message that was sent.

    Attributes:
      flight: what `Link.send` gave for it. A reply is never paired by what it says itself.
      message: what came back; None where nothing did.
      error: why nothing did, one line.
    """

    flight: Hashable
    message: Message | None
    error: str = ""


class Link(Protocol):
    """A network. No call waits for a client."""

    def nodes(self) -> Iterable[int]:
        """Nodes that can be reached now. A node has the same number for as long as it lives."""
        ...

    def name(self, node: int) -> str:
        """Who a node is: the same whenever it comes back, as far as the network knows."""
        ...

    def send(self, node: int, message: Message, seconds: float) -> Hashable | None:
        """Sends a message whose reply is waited for that long.

        Returns:
          A name of the flight, never the same for two; None if it cannot be sent.
        """
        ...

    def receive(self) -> list[Reply]:
        """Replies that have come since the last call, in the order in which they came."""
        ...

    def forget(self, flight: Hashable) -> None:
        """The reply of a flight is not waited for any more; it may come all the same."""
        ...
