"""A scheduler of Dask and its workers, in processes as a user starts them."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def until(condition, seconds=300.0):
    """Waits for a condition; returns what it gave."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)
    return found


@contextlib.contextmanager
def _process(module, *arguments, **environment):
    process = subprocess.Popen(
        [sys.executable, "-m", f"distributed.cli.{module}", *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env={**os.environ, **{name: str(value) for name, value in environment.items()}},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def scheduler(folder):
    """A scheduler; gives its address."""
    told = folder / "scheduler.json"
    with _process("dask_scheduler", "--host=127.0.0.1", "--port=0", "--no-dashboard",
                  f"--scheduler-file={told}"):  # fmt: skip
        until(told.exists)
        yield until(lambda: read_address(told))


def read_address(told):
    """What a scheduler has written into its file; None while it is writing."""
    try:
        return json.loads(told.read_text())["address"]
    except ValueError:
        return None


def worker(address, *arguments, **environment):
    """A worker that nobody starts again when it has died."""
    return _process(
        "dask_worker", address, "--no-nanny", "--no-dashboard", *arguments, **environment
    )
