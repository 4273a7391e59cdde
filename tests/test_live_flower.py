"""Flower as a link: with its own messages, without its processes."""

import asyncio
import base64
import sys
import threading
import time
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

flwr = pytest.importorskip("flwr.app", reason="needs the extra live")

import httpx  # noqa: E402
from cryptography.hazmat.primitives import hashes, serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402
from flwr.app import Context, Error, RecordDict  # noqa: E402
from flwr.app import Message as FlowerMessage  # noqa: E402
from flwr.proto.node_pb2 import NodeInfo  # noqa: E402
from flwr.serverapp import Grid  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

from fedrevive_jax.errors import UserError  # noqa: E402
from fedrevive_jax.live import keys, wire  # noqa: E402
from fedrevive_jax.live.children import Child, stopped_together  # noqa: E402
from fedrevive_jax.live.federation import Federation  # noqa: E402
from fedrevive_jax.live.flower import client_app, gate, hosting, records  # noqa: E402
from fedrevive_jax.live.flower.link import GridLink  # noqa: E402
from fedrevive_jax.live.link import PREPARE, TRAIN, Message  # noqa: E402
from fedrevive_jax.live.trainer import Options, Trainer, listen  # noqa: E402
from fedrevive_jax.presets import resolve  # noqa: E402
from fedrevive_jax.record import files  # noqa: E402
from tests.toys import small  # noqa: E402

pytestmark = pytest.mark.slow  # run where the extra `live` is installed


@pytest.fixture(autouse=True)
def identity():
    """Flower's messages ask the process who it is."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


class FakeGrid(Grid):
    """Hands every message to a function at once; its replies can be pulled.

    What Flower's contract has beside is never called by the link, and would be seen.
    """

    def __init__(self, answer, nodes=(1,)):
        self._answer, self._nodes = answer, nodes
        self.waiting = {}
        self.pushed = 0

    def set_run(self, run):
        raise NotImplementedError

    run = None

    def create_message(self, *args, **kwargs):
        raise NotImplementedError

    def get_node_ids(self):
        raise NotImplementedError

    def get_nodes(self):
        return [NodeInfo(node_id=node) for node in self._nodes]

    def push_messages(self, messages):
        ids = []
        for message in messages:
            self.pushed += 1
            name = f"message {self.pushed}"
            message.metadata.__dict__["_message_id"] = name
            self.waiting[name] = self._answer(message)
            ids.append(name)
        return ids

    def pull_messages(self, message_ids):
        return [reply for name in message_ids for reply in self.waiting.pop(name, ())]

    def send_and_receive(self, messages, *, timeout=None):
        raise NotImplementedError


def received(link, seconds=20.0):
    """What a link gives next."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if replies := link.receive():
            return replies
        time.sleep(0.01)
    return []


def echo(message):
    return [FlowerMessage(message.content, reply_to=message)]


@pytest.mark.parametrize("message", [Message(PREPARE, {"a": 1}), Message(TRAIN, {}, b"\0\1\xff")])
def test_a_message_comes_back_as_it_was_sent(message):
    assert records.from_record(records.to_record(message)) == message
    grid = FakeGrid(echo)
    link = GridLink(grid)
    flight = link.send(1, message, 60.0)
    assert received(link) == [(flight, message, "")]
    link.close()


def foreign(message):
    """A reply that says that it is one to another message, beside the right one."""
    other = FlowerMessage(records.to_record(Message("other", {})), reply_to=message)
    other.metadata.__dict__["_reply_to_message_id"] = "another"
    return [other, *echo(message)]


def wrong(message):
    return [FlowerMessage(RecordDict(), reply_to=message)]


def failed(message):
    return [FlowerMessage(Error(code=2, reason="died\nof something"), reply_to=message)]


@pytest.mark.parametrize(
    ("answer", "error"),
    [(foreign, ""), (wrong, "no message of this package"), (failed, "died of something")],
)
def test_every_flight_ends_with_one_reply_that_is_its_own(answer, error):
    grid = FakeGrid(answer)
    link = GridLink(grid)
    flight = link.send(1, Message(TRAIN, {}), 60.0)
    ((name, message, why),) = received(link)
    assert name == flight
    assert (message is None) == bool(error)
    assert message is None or message.kind == TRAIN
    assert error in why
    assert link.receive() == []
    link.close()


@pytest.mark.parametrize("given", [[None], [""], []])
def test_a_message_that_flower_does_not_take_has_no_flight(given):
    grid = FakeGrid(echo)
    grid.push_messages = lambda messages: given
    link = GridLink(grid)
    assert link.send(1, Message(TRAIN, {}), 60.0) is None
    link.close()


def test_one_that_is_slow_to_be_pulled_holds_nobody_up():
    release = threading.Event()

    class Slow(FakeGrid):
        def pull_messages(self, message_ids):
            if "message 30" not in message_ids:
                assert release.wait(20)
            return super().pull_messages(message_ids)

    link = GridLink(Slow(echo))
    *slow, quick = (link.send(1, Message(TRAIN, {"n": n}), 60.0) for n in range(30))
    assert [reply.flight for reply in received(link)] == [quick]
    release.set()
    late = []
    while len(late) < len(slow):
        late += [reply.flight for reply in received(link)]
    assert sorted(late) == sorted(slow)
    link.close()


def test_what_is_not_waited_for_is_not_pulled_and_an_error_of_the_network_is_no_reply():
    grid = FakeGrid(echo)
    link = GridLink(grid)
    flight = link.send(1, Message(TRAIN, {}), 60.0)
    calls = []

    def fails(message_ids):
        calls.append(message_ids)
        raise ConnectionError("no SuperLink")

    pull, grid.pull_messages = grid.pull_messages, fails
    end = time.monotonic() + 20
    while not calls and time.monotonic() < end:
        assert link.receive() == []
        time.sleep(0.01)
    grid.pull_messages = pull
    assert [reply.flight for reply in received(link)] == [flight]
    other = link.send(1, Message(TRAIN, {}), 60.0)
    link.forget(other)
    assert received(link, 1.0) == []
    link.close()


def test_a_federation_trains_through_flowers_messages_and_a_trainers_socket(tmp_path, monkeypatch):
    """All but the network and the processes: coordinator, link, ClientApp, socket, trainer."""
    config = small(
        "fedbuff", max_versions=6, max_time=1e9, num_clients=2, concurrency=2, buffer_size=1
    )
    path = tmp_path / "s"
    trainer = Trainer(Options(config, part=1))
    threading.Thread(target=listen, args=(path, trainer), daemon=True).start()
    monkeypatch.setenv(wire.SOCKET, str(path))

    def node(message):
        context = Context(1, 1, {}, RecordDict(), {})
        try:
            return [client_app.pass_on(message, context)]
        except Exception as error:  # as Flower's own process does it
            return [FlowerMessage(Error(code=2, reason=str(error)), reply_to=message)]

    link = GridLink(FakeGrid(node, nodes=(2**63 + 1, 5)))
    federation = Federation(config, link=link)
    receipts = []
    while not federation.finished:
        if (receipt := federation.advance()) is not None:
            receipts.append(receipt)
    federation.close()
    link.close()
    assert [r.version for r in receipts] == list(range(6))
    assert {r.client for r in receipts} == {0, 1}
    assert all(np.isfinite(float(r.loss)) and bool(r.accepted) for r in receipts)


def test_a_node_is_named_by_its_key_and_without_one_by_its_number():
    grid = FakeGrid(echo)
    grid.get_nodes = lambda: [NodeInfo(node_id=3, public_key=b"k"), NodeInfo(node_id=4)]
    link = GridLink(grid)
    assert list(link.nodes()) == [3, 4]
    grid.get_nodes = lambda: [NodeInfo(node_id=9, public_key=b"k")]
    other = GridLink(grid)
    assert list(other.nodes()) == [9]
    assert link.name(3) == other.name(9)  # the database is gone, the key is not
    assert link.name(4) == "4"
    for own in (link, other):
        own.close()


def test_a_reply_that_nobody_can_read_ends_its_flight():
    grid = FakeGrid(echo)
    link = GridLink(grid)
    flight = link.send(1, Message(TRAIN, {}), 60.0)

    def broken(message_ids):
        raise ValueError("no such object")

    grid.pull_messages = broken
    ((name, message, why),) = received(link)
    assert (name, message) == (flight, None)
    assert "no such object" in why
    link.close()


class FakeControl:
    """Starts servers that get so far and end, one after the other."""

    def __init__(self, state, arrivals):
        self._state, self._arrivals = state, iter(arrivals)
        self.runs = 0

    def run(self, folder):
        self.runs += 1
        arrivals = next(self._arrivals, None)
        status = {"state": "finished"} if arrivals is None else {
            "state": "running", "arrivals": arrivals,
        }  # fmt: skip
        files.write_json(folder / "status.json", status)
        return str(self.runs)

    def stop(self, run):
        pass


@pytest.mark.parametrize(
    ("arrivals", "runs"),
    [([3] * 20, 1 + hosting.MOST_ENDS), ([*range(20)], 21)],
)
def test_a_server_that_ends_again_and_again_without_an_arrival_is_given_up(
    tmp_path, monkeypatch, arrivals, runs
):
    monkeypatch.setattr(hosting, "LOOK", 0.0)
    control = FakeControl(tmp_path, arrivals)
    log = tmp_path / "log"
    log.write_text("error: the disk is full\n")

    def supervise():
        child = Child("SuperLink", [sys.executable, "-c", "import time; time.sleep(60)"], log)
        with stopped_together([child]):
            return hosting._supervise(tmp_path, control, [child], lambda: False, lambda line: None)

    if runs > 20:
        assert supervise() == {"state": "finished"}
    else:
        with pytest.raises(UserError, match="does not stay alive: error: the disk is full"):
            supervise()
    assert control.runs == runs


# --- the gate -------------------------------------------------------------------------------------


def signed(key, at=None, path="/v1/fleet/pull-messages", **headers):
    """A request as Flower's node makes it: (path, headers)."""
    told = (at or datetime.now(UTC)).isoformat()
    pem = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    signature = key.sign(told.encode(), ec.ECDSA(hashes.SHA256()))
    return path, {
        "flwr-public-key": base64.b64encode(pem).decode(),
        "flwr-signature": base64.b64encode(signature).decode(),
        "flwr-timestamp": told,
        "content-length": "3",
        **headers,
    }


def pass_gate(client, members, path, headers, body=b"abc"):
    """The status that a gate over a client gives, which is closed then."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
    }  # fmt: skip

    async def pass_once():
        async with client:
            await gate.Gate(client, members)(scope, receive, send)

    asyncio.run(pass_once())
    return sent[0]["status"]


def test_the_gate_passes_on_what_one_of_its_keys_has_signed_just_now(tmp_path):
    for name in ("one", "two", "three"):
        keys.make_client(tmp_path / name)
    own, other, gone = (
        serialization.load_ssh_private_key((tmp_path / name).read_bytes(), None)
        for name in ("one", "two", "three")
    )
    (tmp_path / "three.pub").unlink()  # taken away
    passed = []

    def upstream(request):
        passed.append((request.url.path, request.content, request.headers["flwr-timestamp"]))
        return httpx.Response(200, stream=httpx.ByteStream(b"yes"))

    def ask(path, headers):
        transport = httpx.MockTransport(upstream)  # stands for the network alone
        client = httpx.AsyncClient(base_url="https://link", transport=transport)
        return pass_gate(client, gate.keys_in(tmp_path), path, headers)

    for key in (own, other):
        path, headers = signed(key)
        assert ask(path, headers) == 200
        assert passed.pop() == (path, b"abc", headers["flwr-timestamp"])
    old = datetime.now(UTC) - timedelta(seconds=gate.SKEW + 5)
    path, good = signed(own)
    _, others = signed(other)
    without = {name: value for name, value in good.items() if name != "content-length"}
    for request, status in (
        (signed(gone), 401),
        (signed(own, old), 401),
        ((path, {**good, "flwr-signature": others["flwr-signature"]}), 401),
        ((path, {**good, "flwr-timestamp": others["flwr-timestamp"] + "0"}), 401),
        ((path, {**good, "flwr-public-key": "%"}), 401),
        ((path, {"content-length": "3"}), 401),
        ((path, without), 411),
        ((path, {**good, "content-length": str(gate.LARGEST + 1)}), 413),
        (signed(own, path="/v1/control/start-run"), 404),
        (signed(own, path="/v1/fleet/../control/start-run"), 404),
        (signed(own, path="/v1/fleet/%2e%2e/control/start-run"), 404),
        (signed(own, path="/v1/runtime/get-nodes"), 404),
    ):
        assert ask(*request) == status, request
    assert not passed  # a member that asks for control is not heard either


def test_clients_of_one_machine_do_not_depend_on_the_servers_cohort():
    """A cohort of six is no concern of what one client holds."""
    config = resolve("digits", "fedavg", num_clients=6, concurrency=6, buffer_size=6)
    assert config.open_slots == 6
    clients = hosting.shared_between(config, [0.0, 1.0, 0.0])
    assert [(one.part, one.pause) for one in clients] == [(0, 0.0), (1, 1.0), (2, 0.0)]
    assert {one.config.num_clients for one in clients} == {3}
