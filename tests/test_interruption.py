"""Signals reach a run whatever it is doing; no handler outlives the watch."""

import os
import signal
import subprocess
import sys

import pytest

from fedrevive_jax.interruption import Interruption

# The main thread is inside C code that no Python handler ever interrupts, as in a compilation.
BUSY = """
import hashlib
import sys
from fedrevive_jax.interruption import Interruption
with Interruption(float(sys.argv[1])):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""

RUNS = """
import sys
from fedrevive_jax.interruption import Interruption
with Interruption(1000) as interruption:
    print("ready", flush=True)
    while not interruption.requested:
        pass
sys.exit(interruption.status)
"""


def started(code, *arguments):
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_inside_a_long_computation_leaves_in_time(number):
    process = started(BUSY, "0.2")
    process.send_signal(number)
    _, words = process.communicate()
    assert process.returncode == 128 + number
    assert words.startswith(f"stopped by 0.2 s after {number.name}, inside a long computation")
    assert len(words.splitlines()) == 1


def test_a_second_signal_ends_the_process_at_once():
    process = started(BUSY, "1000")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    _, words = process.communicate()
    assert "a second signal" in words
    # Signals that are waiting together are delivered in the order of their numbers.
    assert process.returncode in (143, 130)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_notices_ends_itself(number):
    process = started(RUNS)
    process.send_signal(number)
    _, words = process.communicate()
    assert (process.returncode, words) == (128 + number, "")


def test_handlers_are_those_from_before():
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    with Interruption(1000) as interruption:
        assert not interruption.requested
        assert interruption.status == 0
    assert [signal.getsignal(number) for number in numbers] == before
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert not interruption.requested
