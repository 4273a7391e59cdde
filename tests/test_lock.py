"""Two runs never write one folder; a dead one is in nobody's way."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from fedrevive_jax.errors import ConfigError
from fedrevive_jax.record import lock

HOLD = """
import sys
from pathlib import Path
from fedrevive_jax.record import lock
with lock.exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder until its input ends."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def without_locks(monkeypatch):
    """A file system that has none."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_the_second_is_refused_and_told_who_holds_it(tmp_path, holder, monkeypatch):
    who = rf"workdir={tmp_path}: is in use by process {holder.pid} on {socket.gethostname()} since"
    with pytest.raises(ConfigError, match=who), lock.exclusive(tmp_path):
        pass
    without_locks(monkeypatch)
    with pytest.raises(ConfigError, match=who + ".*or delete run.lock"), lock.exclusive(tmp_path):
        pass
    holder.communicate("")  # ends in good order
    with lock.exclusive(tmp_path):
        pass


def test_it_is_taken_over_from_the_dead(tmp_path, holder, monkeypatch, caplog):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == holder.pid  # left behind
    with monkeypatch.context() as patch:
        without_locks(patch)
        with lock.exclusive(tmp_path):
            assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
    assert f"taken over from process {holder.pid}" in caplog.text
    (tmp_path / lock.NAME).write_text("{ no JSON")
    with lock.exclusive(tmp_path):
        pass


def test_two_in_one_process_are_refused_too(tmp_path):
    with lock.exclusive(tmp_path):
        with pytest.raises(ConfigError, match=f"process {os.getpid()}"), lock.exclusive(tmp_path):
            pass
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
