"""A link without a network, for tests of the coordinator: it does what it is told, or the worst."""

from collections import deque

from fedrevive_jax.errors import UserError
from fedrevive_jax.live.link import PREPARE, Message, Reply


class _Link:
    """Nodes that are there, and replies that wait to be received."""

    def __init__(self, nodes):
        self.up = set(nodes)
        self._replies = []
        self._count = 0

    def nodes(self):
        return set(self.up)

    def name(self, node):
        return str(node)

    def receive(self):
        ready, self._replies = self._replies, []
        return ready

    def forget(self, flight):
        pass


class Planned(_Link):
    """Trains nobody: the reply to a job is the upload that was kept for it, in a planned order."""

    def __init__(self, nodes, order, packed):
        """Args: nodes: how many; order: jobs as they arrive; packed: job -> its upload."""
        super().__init__(range(nodes))
        self._order, self._packed = deque(order), packed
        self._under_way = {}

    def send(self, node, message, seconds):
        self._count += 1
        if message.kind == PREPARE:
            self._replies.append(Reply(self._count, Message(PREPARE, {"name": node})))
        else:
            self._under_way[message.header["job"]] = self._count
        return self._count

    def receive(self):
        ready = super().receive()
        if self._order and self._order[0] in self._under_way:
            job = self._order.popleft()
            body = self._packed[job]
            ready.append(Reply(self._under_way.pop(job), Message("train", {"seconds": 1}, body)))
        return ready


class Hostile(_Link):
    """Does to its messages what it is told, in any order; replies come when they are told to."""

    def __init__(self, nodes):
        super().__init__(range(nodes))
        self.refuses = False
        self.open = {}  # flight -> (node, message), what could still be answered
        self.over = {}  # what was answered or is not waited for: it may be answered all the same

    def send(self, node, message, seconds):
        if self.refuses or node not in self.up:
            return None
        self._count += 1
        self.open[self._count] = node, message
        return self._count

    def forget(self, flight):
        if flight in self.open:
            self.over[flight] = self.open.pop(flight)

    def answer(self, flight, message, error=""):
        """Lets a reply come, also to what nobody waits for any more."""
        if flight in self.open:
            self.over[flight] = self.open.pop(flight)
        self._replies.append(Reply(flight, message, error))


class Direct(_Link):
    """Hands every message to a trainer of this process, and has the reply at once."""

    def __init__(self, trainers, before=lambda message: None):
        """Args: trainers: by node; before: called with every message, may raise."""
        super().__init__(range(len(trainers)))
        self._trainers, self._before = trainers, before

    def send(self, node, message, seconds):
        self._count += 1
        try:
            self._before(message)
            reply = Reply(self._count, self._trainers[node].answer(message))
        except (UserError, ValueError) as error:
            reply = Reply(self._count, None, str(error))
        self._replies.append(reply)
        return self._count
