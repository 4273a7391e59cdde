"""A live federation with real processes on loopback: kills, and who gets in."""

import http.client
import json
import os
import signal
import socket
import ssl
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flwr", reason="needs the extra live")

from fedrevive_jax.live import keys
from fedrevive_jax.live.flower import commands
from fedrevive_jax.presets import resolve
from fedrevive_jax.record import files
from fedrevive_jax.running import runner
from tests.live_run import (
    SMALL,
    arrivals,
    kill,
    newest_checkpoint,
    processes,
    start,
    wait_for,
)

pytestmark = pytest.mark.slow
PROTOBUF = "application/protobuf"
# What an outsider tries: control and runtime, and ways round the gate.
PATHS = (
    "/v1/control/start-run", "/v1/runtime/get-nodes", "/health", "/",
    "/v1/fleet/../control/start-run", "/v1/fleet/%2e%2e/control/start-run",
    "/v1/fleet//", "//v1/control/start-run", "/v1/fleet/x?y=/v1/control",
)  # fmt: skip
PACE = 0.1  # seconds that a job takes longer


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_federation_survives_every_kill_and_counts_every_upload_once(tmp_path):
    run, state = tmp_path / "run", tmp_path / "run.live"
    serve = [
        "--local_clients=3", f"--pauses={PACE}", "--method=fedbuff", "--buffer_size=1",
        "--max_versions=100000", "--eval_every=20", "--save_seconds=2", "--job_seconds=60",
        f"--workdir={run}", *SMALL,
    ]  # fmt: skip
    process = start("serve", *serve, cwd=tmp_path)
    try:
        wait_for(lambda: arrivals(state) >= 3, process)
        status = json.loads((state / "status.json").read_text())
        for victim in (
            ("live.trainer", str(state / "client_0.json")),
            ("flower-supernode", "--superlink"),  # all three
            ("flower-superlink", str(state)),
        ):
            before = arrivals(state)
            kill(*victim)
            wait_for(lambda before=before: arrivals(state) >= before + 3, process)
        saved = newest_checkpoint(run)
        before = arrivals(state)
        os.kill(json.loads((state / "status.json").read_text())["pid"], signal.SIGKILL)
        wait_for(lambda: arrivals(state) >= saved + 4 and arrivals(state) != before, process)
        assert json.loads((state / "status.json").read_text())["pid"] != status["pid"]
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=90)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, output
    assert "saved at version" in output
    assert "Traceback" not in output
    wait_until_nothing_is_left(state)
    # The same command goes on; when it is killed itself, nothing is left behind either.
    at = newest_checkpoint(run)
    again = start("serve", *serve, cwd=tmp_path)
    try:
        wait_for(lambda: arrivals(state) >= at + 3, again)
        twice = start("serve", *serve, cwd=tmp_path)
        told, _ = twice.communicate(timeout=60)
        assert twice.returncode == 1
        assert f"error: --state_dir={state}: is in use by process {again.pid}" in told
    finally:
        again.kill()
        again.wait()
    wait_until_nothing_is_left(state)

    rows = files.read_rows(run / "arrivals.jsonl")
    assert [row["index"] for row in rows] == list(range(len(rows)))
    assert [row["version"] for row in rows] == list(range(len(rows)))  # each made one version
    assert all(row["staleness"] == row["version"] - row["base_version"] for row in rows)
    assert max(row["staleness"] for row in rows) <= 12
    assert {row["client"] for row in rows} <= {0, 1, 2}
    assert all(np.isfinite(row["loss"]) for row in rows)


def wait_until_nothing_is_left(state):
    end = time.monotonic() + 20
    while left := processes(str(state)):
        assert time.monotonic() < end, left
        time.sleep(0.1)


def answer(port, authority, method, path, body=b""):
    """The status that a server tells somebody with no more than the authority's certificate."""
    context = ssl.create_default_context(cafile=authority)
    connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=20)
    connection.request(method, path, body, {"Content-Type": PROTOBUF})
    status = connection.getresponse().status
    connection.close()
    return status


def test_nobody_comes_in_but_registered_nodes_and_they_to_the_door_alone(tmp_path):
    keys.make_server(tmp_path / "certificates", ["127.0.0.1"])
    for name in ("keys/one", "stranger"):
        keys.make_client(tmp_path / name)
    port = commands.free_port()
    authority = tmp_path / "certificates" / "ca.crt"
    server = start(
        "serve", f"--listen=127.0.0.1:{port}", "--clients=keys", "--method=fedbuff",
        "--buffer_size=1", *SMALL, cwd=tmp_path,
    )  # fmt: skip
    state = tmp_path / "runs" / "live_digits_fedbuff.live"
    children = []

    def join(key, name):
        children.append(
            start("join", f"--server=127.0.0.1:{port}", f"--certificate={authority}",
                  f"--key={key}", f"--state_dir={tmp_path / name}", cwd=tmp_path)
        )  # fmt: skip
        return children[-1]

    try:
        wait_for(lambda: (state / "status.json").exists(), server)
        # Control and runtime are not there from outside, however the path is written.
        for path in PATHS:
            assert answer(port, authority, "POST", path) == 404, path
        assert answer(port, authority, "GET", "/v1/fleet/pull-messages") == 404
        # The door for nodes is there, and asks who it is.
        assert answer(port, authority, "POST", "/v1/fleet/activate-node") == 401
        # All of it is there behind the gate: the paths are those that matter.
        (link,) = processes("flower-superlink", str(state))
        inside = int(Path(f"/proc/{link}/cmdline").read_text().split("--port\0")[1].split("\0")[0])
        for path in PATHS[:2]:
            assert answer(inside, authority, "POST", path) != 404, path
        # Nor is the SuperLink itself anywhere but on loopback.
        assert listening_on_all() == []
        with socket.create_connection(("127.0.0.1", port), timeout=20) as plain:
            plain.sendall(b"POST /v1/fleet/activate-node HTTP/1.1\r\nHost: x\r\n\r\n")
            assert not plain.recv(100).startswith(b"HTTP/1.1 2")
        stranger = join(tmp_path / "stranger", "s")
        member = join(tmp_path / "keys" / "one", "m")
        keyless = commands.supernode(tmp_path, "keyless", f"127.0.0.1:{port}", tmp_path, authority)
        keyless.start()
        wait_for(lambda: arrivals(state) >= 4, server)
        before = arrivals(state)
        kill("flower-supernode", str(tmp_path / "keys" / "one"))
        # Flower lets it in again after a while, in the same seat.
        wait_for(lambda: arrivals(state) >= before + 2, server)
        keyless.stop()
        told, _ = stranger.communicate(timeout=240)
        assert stranger.returncode == 1
        assert "Traceback" not in told
        assert "stranger.pub among its keys?" in told
        member.send_signal(signal.SIGTERM)
        told, _ = member.communicate(timeout=60)
        assert member.returncode == 143, told
        server.send_signal(signal.SIGINT)
        output, _ = server.communicate(timeout=90)
        assert server.returncode == 130, output
        assert " 1 clients, 1 at work" in output  # the member alone
    finally:
        for child in (server, *children):
            child.kill()
            child.wait()


def listening_on_all():
    """Local addresses, other than those of loopback, at which Flower's programs listen."""
    pids = set(processes("flower-super"))
    inodes = set()
    for pid in pids:
        try:
            links = [os.readlink(f"/proc/{pid}/fd/{n}") for n in os.listdir(f"/proc/{pid}/fd")]
        except OSError:
            continue
        inodes |= {link[8:-1] for link in links if link.startswith("socket:[")}
    rows = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    loopback = ("0100007F:", "00000000000000000000000001000000:")
    return [r[1] for r in rows if r[3] == "0A" and r[9] in inodes and not r[1].startswith(loopback)]


def test_keys_that_come_and_go_make_no_other_run_and_none_goes_beyond_its_number(tmp_path):
    """A finished run of three clients: what the flags say is seen without any process of Flower."""
    keys.make_server(tmp_path / "certificates", ["127.0.0.1"])
    for name in "abcd":
        keys.make_client(tmp_path / "keys" / name)
    away = (tmp_path / "keys" / "d.pub").rename(tmp_path / "d.pub")
    given = dict(flag.removeprefix("--").split("=") for flag in SMALL) | {
        "method": "fedavg", "max_time": 1e9, "max_versions": 2, "num_clients": 3,
        "concurrency": 3, "workdir": str(tmp_path / "run"),
    }  # fmt: skip
    runner.run(resolve(**given), keep_record=True)

    def again():
        listen = f"--listen=127.0.0.1:{commands.free_port()}"
        flags = (listen, "--clients=keys", "--method=fedavg", "--max_versions=2", "--workdir=run")
        process = start("serve", *flags, *SMALL, cwd=tmp_path)
        told, _ = process.communicate(timeout=240)
        return process.returncode, told.splitlines()[-1]

    (tmp_path / "keys" / "a.pub").unlink()
    assert again() == (0, f"{tmp_path / 'run'} holds this run, finished; nothing to do")
    away.rename(tmp_path / "keys" / "d.pub")
    assert again()[0] == 0
    keys.make_client(tmp_path / "keys" / "e")
    status, told = again()
    assert status == 1
    assert told.startswith("error: --num_clients=3: must be at least 4, the clients; the run was")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((), "--local_clients=0: must be 1 to 64, or give --listen=HOST:PORT"),
        (("--local_clients=65",), "--local_clients=65: must be 1 to 64"),
        (("--local_clients=2", "--pauses=x"), "--pauses=x: must be seconds"),
        (("--listen=8443",), "--listen=8443: must be HOST:PORT"),
        (("--listen=h:8443",), "--certificates=certificates: holds no ca.crt"),
        (("--local_clients=2", "--listen=h:1"), "--local_clients=2: goes without --listen"),
        (
            ("--local_clients=2", "--clients=keys"),
            "--clients=keys: goes with --listen, not with --local_clients",
        ),
        (
            ("--listen=h:1", "--pauses=1"),
            "--pauses=1: goes with --local_clients, not with --listen",
        ),
        (("--local_clients=2", "--proxy=histogram", "--method=fedrevive"), "--proxy=histogram: is"),
    ],
)
def test_wrong_flags_of_serve_are_told_in_one_line(tmp_path, arguments, error):
    process = start("serve", *arguments, cwd=tmp_path)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 1
    assert output.splitlines()[-1].startswith(f"error: {error}"), output
    assert "Traceback" not in output
