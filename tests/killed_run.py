"""python -m tests.killed_run MOMENT SIGNAL [flags of experiments.main]: a run that gets a signal at
its MOMENT-th moment: a change of a file in its folder, an arrival, or an evaluation."""

import os
import signal
import subprocess
import sys

from fedrevive_jax.config import Config
from fedrevive_jax.simulation.simulator import Simulation

# What an audit hook sees of changes; an `open` for reading is none.
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def is_change(event: str, arguments: tuple, folder: str) -> bool:
    """Whether an audit event is about to change something in a folder."""
    if event not in CHANGES or folder not in str(arguments[0]):
        return False
    return event != "open" or (isinstance(arguments[1], str) and arguments[1] != "r")


def as_flags(config: Config) -> list[str]:
    """The command line of a configuration."""
    return [f"--{name}={value}" for name, value in config.as_dict().items()]


def start(moment: int, number: signal.Signals, *arguments: str) -> subprocess.CompletedProcess:
    """Runs this program to its end."""
    return subprocess.run(
        [sys.executable, "-m", "tests.killed_run", str(moment), number.name, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def main(moment: int, number: signal.Signals, folder: str) -> None:
    passed = 0

    def one_more() -> None:
        nonlocal passed
        passed += 1
        if passed == moment:
            os.kill(os.getpid(), number)

    def hook(event, arguments):
        if is_change(event, arguments, folder):
            one_more()

    def counted(function):
        def call(*arguments, **kwargs):
            one_more()
            return function(*arguments, **kwargs)

        return call

    sys.addaudithook(hook)
    Simulation.advance = counted(Simulation.advance)
    Simulation.evaluate = counted(Simulation.evaluate)


if __name__ == "__main__":
    from experiments import flags
    from experiments import main as program

    MOMENT, SIGNAL, *REST = sys.argv[1:]
    sys.argv[1:] = REST
    WORKDIR = next(flag for flag in REST if flag.startswith("--workdir=")).partition("=")[2]
    main(int(MOMENT), signal.Signals[SIGNAL], WORKDIR)
    flags.run(program.main)
