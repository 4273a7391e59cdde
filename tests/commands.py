"""Commands as a user types them, in processes of their own; and that user."""

import contextlib
import os
import subprocess
import sys


def started(*arguments, program="main", cwd=None):
    return subprocess.Popen(
        [sys.executable, "-m", f"experiments.{program}", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )


def call(*arguments, **where):
    with started(*arguments, **where) as process:
        out, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


@contextlib.contextmanager
def nobody():
    """As a user whom permissions bind; root is bound by none."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def flags(**values):
    return [f"--{name}={value}" for name, value in values.items()]
