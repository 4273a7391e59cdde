"""The parts of a live federation: what is sent, who is who, what a client does with it."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from fedrevive_jax.clock import delays
from fedrevive_jax.data import Preprocessing
from fedrevive_jax.errors import ConfigError, FileError, UserError
from fedrevive_jax.live import packing, serving, settings, wire
from fedrevive_jax.live.children import Child, ChildError, complaint, stopped_together
from fedrevive_jax.live.coordinator import Arrived, Times, prepared
from fedrevive_jax.live.link import Message
from fedrevive_jax.live.registry import LONGEST_REST, Registry
from fedrevive_jax.live.trainer import Options, Trainer
from fedrevive_jax.presets import resolve
from fedrevive_jax.server.core import Receipt
from fedrevive_jax.simulation.simulator import Simulation
from tests.toys import small

TREE = {
    "a": np.asarray([1.5, -2.0], np.float32),
    "b": (np.arange(6, dtype=np.int32).reshape(2, 3), np.asarray(True)),
    "c": np.zeros((0, 3), np.float32),
}


def test_a_packed_tree_is_its_numbers_in_order_and_comes_back():
    block = packing.pack(TREE)
    assert block == (
        b"\x00\x00\xc0\x3f\x00\x00\x00\xc0"  # 1.5 and -2 in IEEE 754, little-endian
        + b"".join(n.to_bytes(4, "little") for n in range(6))
        + b"\x01"
    )
    assert packing.size(TREE) == len(block) == 33
    back = packing.unpack(jax.eval_shape(lambda: TREE), block)
    jax.tree.map(np.testing.assert_array_equal, back, TREE)
    assert [leaf.dtype for leaf in jax.tree.leaves(back)] == ["float32", "int32", "bool", "float32"]


@pytest.mark.parametrize("block", [b"", bytes(32), bytes(34)])
def test_a_block_of_another_size_is_refused(block):
    with pytest.raises(ValueError, match=f"{len(block)} bytes, must be 33"):
        packing.unpack(TREE, block)


def test_a_message_passes_a_socket_whole():
    ours, theirs = socket.socketpair()
    body = os.urandom(3_000_000)  # more than a socket holds
    with ours, theirs:
        sender = threading.Thread(target=wire.send, args=(ours, {"job": 3, "ü": None}, body))
        sender.start()
        assert wire.receive(theirs) == ({"job": 3, "ü": None}, body)
        sender.join()
        ours.sendall(b"\0" * 10)
        ours.shutdown(socket.SHUT_WR)
        with pytest.raises(wire.ClosedError):
            wire.receive(theirs)


@pytest.mark.parametrize(
    "raw", [b"\xff" * 16, (1).to_bytes(8, "little") + bytes(8) + b"7", bytes(16)]
)
def test_what_is_no_message_is_refused(raw):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(raw)
        with pytest.raises(ValueError, match=r"longer|no JSON object|Expecting value"):
            wire.receive(theirs)


def test_a_client_keeps_its_seat_and_a_full_federation_takes_no_more(caplog):
    registry = Registry(2)
    registry.meet([7, 8, 9])
    assert registry.sit(8, "b") == []
    assert registry.sit(7, "a") == []
    assert registry.sit(9, "c") is None
    assert "node 9 is turned away: num_clients=2" in caplog.text
    assert {node: own.seat and own.seat.number for node, own in registry.clients.items()} == {
        7: 1, 8: 0, 9: None,
    }  # fmt: skip
    registry.seats["a"].visits = 5
    assert registry.sit(9, "a") == [7]  # the same client, by another node
    assert set(registry.clients) == {8, 9}
    later = Registry(2)
    later.restore(json.loads(json.dumps(registry.snapshot())))
    later.meet([2**64 - 1])
    assert later.sit(2**64 - 1, "a") == []
    seat = later.clients[2**64 - 1].seat
    assert (seat.number, seat.visits) == (1, 5)
    assert later.sit(2**64 - 1, "x" * 1000) is None


def test_a_client_that_fails_again_rests_twice_as_long():
    registry = Registry(1)
    registry.meet([1])
    client = registry.clients[1]
    rests = []
    for _ in range(8):
        client.rest(100.0, 2.0)
        rests.append(client.rests_until - 100)
    assert rests == [2, 4, 8, 16, 32, 64, 64, 64]
    assert rests[-1] == 2 * LONGEST_REST


CONFIG = small("fedbuff", client_batch=1)


def told(config, dataset, origin=None):
    return settings.of_server(config, dataset, origin or {})


@pytest.fixture(scope="module")
def simulation():
    return Simulation(CONFIG)


def test_settings_come_back_and_hold_no_path(simulation):
    sent = told(simulation.config, simulation.dataset)
    assert settings.from_json(sent.to_json()) == sent
    paths = [name for name in settings.FIELDS if "dir" in name or "weights" in name]
    assert not paths


@pytest.mark.parametrize(
    "change",
    [
        lambda given: given["fields"].update(workdir="/etc"),
        lambda given: given["fields"].pop("seed"),
        lambda given: given.update(classes=[1, 2]),
        lambda given: given.update(more=1),
        lambda given: given["preprocessing"].update(shell="rm"),
        lambda given: given["preprocessing"].update(flip="yes"),
        lambda given: given["preprocessing"].update(mean="wide"),
        lambda given: given.update(input_shape="wide"),
    ],
)
def test_settings_that_are_more_or_less_than_settings_are_refused(simulation, change):
    given = json.loads(told(simulation.config, simulation.dataset).to_json())
    change(given)
    with pytest.raises(ConfigError, match="no settings of this version"):
        settings.from_json(json.dumps(given))
    with pytest.raises(ConfigError, match="no settings of this version"):
        settings.from_json("[" * 100_000)


def test_a_client_takes_the_servers_numbers_of_the_classes(simulation):
    sent = told(simulation.config, simulation.dataset)
    own = dataclasses.replace(
        simulation.dataset,
        num_classes=3,
        class_names=("7", "3", "0"),
        labels=np.asarray(simulation.dataset.labels % 3, np.int32),
        preprocessing=Preprocessing(flip=True),
    )
    served = settings.as_served(sent, own)
    assert served.num_classes == 10
    np.testing.assert_array_equal(served.labels[:50], np.asarray([7, 3, 0])[own.labels[:50]])
    assert served.preprocessing == simulation.dataset.preprocessing
    with pytest.raises(FileError, match="has a class 'cat'; the server knows 0, 1"):
        settings.as_served(sent, dataclasses.replace(own, class_names=("7", "cat", "0")))
    smaller = dataclasses.replace(own, samples=own.samples[:, :4])
    with pytest.raises(
        FileError, match=r"its samples are \[4, 8, 1\]; the server's are \[8, 8, 1\]"
    ):
        settings.as_served(sent, smaller)


def test_a_trainer_does_what_a_simulated_client_does_bit_for_bit(simulation):
    job = 3
    client = int(simulation.schedule.client[job])
    trainer = Trainer(Options(CONFIG, part=client))
    sent = prepared(told(CONFIG, simulation.dataset).to_json(), "one")
    with pytest.raises(UserError, match="not prepared"):
        trainer.answer(Message("train", {"settings": "one"}))
    assert trainer.answer(sent).header == {"name": f"part {client}"}
    order = {"job": job, "visit": 0, "version": 0, "settings": "one"}
    answer = trainer.answer(Message("train", order, packing.pack(simulation.server.params)))
    expected = simulation.train_jobs(np.asarray([job]))[job]
    assert answer.header["version"] == 0
    assert answer.body == packing.pack(expected)
    with pytest.raises(UserError, match="not prepared"):  # for others
        trainer.answer(Message("train", {**order, "settings": "two"}, b""))
    with pytest.raises(ValueError, match="bytes, must be"):
        trainer.answer(Message("train", order, b"short"))


def test_other_pretrained_weights_than_the_servers_are_refused(simulation):
    sent = told(CONFIG, simulation.dataset, {"weights_sha256": "0" * 64})
    with pytest.raises(ConfigError, match="not the weights that the server started from"):
        Trainer(Options(CONFIG)).answer(prepared(sent.to_json(), "one"))


def test_what_a_client_decides_and_what_a_run_is_come_back():
    options = Options(CONFIG, 3, 1.5)
    assert Options.from_json(options.to_json()) == options


def test_an_order_comes_back(tmp_path):
    order = serving.Order(CONFIG, Times(1, 2, 3), 4.0, True)
    order.write(tmp_path)
    assert serving.Order.read(tmp_path) == order


def receipt(client):
    return Receipt(0, client, 0, 0, 0, 1, *[None] * 5)  # type: ignore[arg-type]


def test_the_delays_of_a_live_run_are_replayed(tmp_path):
    path = tmp_path / "delays.csv"
    trace = serving.Trace(path)
    for client, trip, training in ((10, 3.0, 1.0), (2, 5.0, 4.5), (2, 2.0, 9.0), (2, 1.0, 0.0)):
        trace.add(Arrived(receipt(client), trip, min(training, trip)))
    trace.close()
    with path.open("a") as stream:
        stream.write("2,1.0,")  # a process has died here
    trace = serving.Trace(path)
    trace.add(Arrived(receipt(2), 1.0, 1.0))
    trace.close()
    config = resolve("digits", "fedbuff", delays="trace", delay_trace=str(path), num_clients=2,
                     concurrency=1)  # fmt: skip
    model = delays.create(config)
    # Recorded client 2 is the first, client 10 the second.
    visits = [model.durations(visit) for visit in range(4)]
    assert [(d.download[1], d.train[1], d.upload[1]) for d in visits[:1]] == [(1, 1, 1)]
    assert [float(d.train[0]) for d in visits] == [4.5, 2.0, 0.001, 1.0]
    assert [float(d.upload[0]) for d in visits] == [0.25, 0.0, 0.4995, 0.0]


def child(tmp_path, code, **kwargs):
    return Child("a child", [sys.executable, "-c", code], tmp_path / "log", **kwargs)


def until(condition, seconds=30.0):
    """Waits for another process, as long as it takes."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


def test_a_process_that_is_killed_is_started_again(tmp_path):
    own = child(tmp_path, "import time; time.sleep(60)")
    with stopped_together([own]):
        first = own.pid
        assert not own.keep()
        os.kill(first, signal.SIGKILL)
        until(own.keep)
        assert own.alive
        assert own.pid != first
        second = own.pid
    assert not own.alive
    with pytest.raises(ProcessLookupError):
        os.kill(second, 0)


def test_a_process_that_ends_at_once_is_given_up_with_its_own_words(tmp_path, monkeypatch):
    monkeypatch.setattr("fedrevive_jax.live.children.FIRST_REST", 0.0)
    own = child(tmp_path, "raise SystemExit('an error: no such key')")
    with (
        stopped_together([own]),
        pytest.raises(ChildError, match="a child does not stay alive: an"),
    ):
        until(lambda: own.keep() and False)


def test_no_process_outlives_the_one_that_started_it(tmp_path):
    """Whatever ends that: here it is killed."""
    code = f"""
import sys, time
from pathlib import Path
from fedrevive_jax.live.children import Child, stopped_together
sleeps = [sys.executable, "-c", "import time; time.sleep(60)"]
own = Child("a child", sleeps, Path({str(tmp_path)!r}) / "log")
with stopped_together([own]):
    print(own.pid, flush=True)
    time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    os.kill(pid, 0)
    parent.kill()
    parent.wait()
    parent.stdout.close()

    def is_gone():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        # Nobody may wait for it here, but then it is a zombie.
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"

    until(is_gone)


def test_a_log_is_told_by_its_last_error(tmp_path):
    log = tmp_path / "log"
    assert "says nothing" in complaint(log)
    log.write_text("start\n\x1b[91mERROR\x1b[0m: no key\nbye\n\n")
    assert complaint(log) == f"ERROR: no key (all of it in {log})"
    log.write_text("start\nbye\n")
    assert complaint(log).startswith("bye")
