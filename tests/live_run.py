"""A live federation in processes of its own, as a user starts it; and whoever kills them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

# A run so small that all its time goes into what carries it.
SMALL = ["--samples_per_client=40", "--local_iterations=2", "--batch_size=8", "--model_width=4"]


def start(module, *arguments, cwd, stdout=subprocess.PIPE):
    return subprocess.Popen(
        [sys.executable, "-m", f"experiments.{module}", *map(str, arguments)],
        cwd=cwd, stdout=stdout, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip


def wait_for(condition, process, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.1)


def arrivals(state):
    try:
        return json.loads((state / "status.json").read_text()).get("arrivals", 0)
    except FileNotFoundError:
        return 0


def processes(*words):
    """Process ids of those whose command holds all words."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if command and all(word in command for word in words):
                found.append(int(entry.name))
    return found


def kill(*words):
    found = processes(*words)
    assert found, words
    for pid in found:
        os.kill(pid, signal.SIGKILL)


def newest_checkpoint(run):
    return max(
        (int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit()), default=0
    )
