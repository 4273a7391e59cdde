"""Signals reach a run whatever it is doing; no handler outlives the watch."""

import os
import signal
import subprocess
import sys

import pytest

from fedrevive_jax.record.interruption import Interruption

# The main thread is inside C code that no Python handler ever interrupts, as in a compilation.
BUSY = """
import hashlib
import sys
from fedrevive_jax.record.interruption import Interruption
with Interruption(float(sys.argv[1])):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""

RUNS = """
import sys
from fedrevive_jax.record.interruption import Interruption
with Interruption(1000) as interruption:
    print("ready", flush=True)
    while not interruption.requested:
        pass
sys.exit(interruption.status)
"""

HANGS = """
import hashlib
import sys
from fedrevive_jax.record.interruption import Interruption
with Interruption(float(sys.argv[1])) as interruption:
    print("ready", flush=True)
    while not interruption.requested:
        pass
print("noticed", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
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


def ended(process):
    """Output and errors of a process that ends by itself; one that does not fails the test."""
    try:
        return process.communicate(timeout=100)
    finally:
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_inside_a_long_computation_leaves_in_time(number):
    process = started(BUSY, "0.2")
    process.send_signal(number)
    _, words = ended(process)
    assert process.returncode == -number  # which a shell shows as 143 or 130
    assert words.startswith(f"stopped by {number.name} in the midst of a computation")
    assert len(words.splitlines()) == 1


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_at_once(second):
    """Also another one than the first."""
    process = started(HANGS, "1000")
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "noticed\n"
    process.send_signal(second)
    ended(process)
    assert process.returncode == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_notices_ends_itself(number):
    process = started(RUNS)
    process.send_signal(number)
    _, words = ended(process)
    assert (process.returncode, words) == (128 + number, "")


def test_a_process_that_does_not_end_itself_is_ended():
    """It has noticed, left the context, and hangs on its way out."""
    process = started(HANGS, "0.2")
    process.send_signal(signal.SIGTERM)
    ended(process)
    assert process.returncode == -signal.SIGTERM


def test_other_signals_do_not_end_a_process():
    """A handler of the program's own stays its own affair, long after a grace of a millisecond."""
    code = """
import signal, subprocess, sys
from fedrevive_jax.record.interruption import Interruption
signal.signal(signal.SIGUSR1, lambda *_: print("own", flush=True))
with Interruption(0.001) as interruption:
    print("ready", flush=True)
    input()
    for _ in range(5):
        subprocess.run([sys.executable, "-c", ""])
    print(interruption.requested)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "own\n"
        words, errors = process.communicate("\n", timeout=100)
        assert (words, errors, process.returncode) == ("False\n", "", 0)


def test_nothing_is_left_of_a_process_that_is_killed():
    """The second process ends with it: it holds the other end of what is read here."""
    process = started(BUSY, "1000")
    process.kill()
    _, words = ended(process)
    assert words == ""


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
