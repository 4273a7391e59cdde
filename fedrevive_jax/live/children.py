"""Processes that belong to this one: started with a log each, kept alive, and stopped with it."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedrevive_jax.errors import UserError

# A process that ends is started again after a rest, longer each time that it ends at once.
FIRST_REST, LONGEST_REST, AT_ONCE, MOST_STARTS = 0.5, 30.0, 20.0, 6
STOP_SECONDS = 5.0
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class ChildError(UserError):
    """A process that is needed does not stay alive."""


@dataclass
class Child:
    """One process.

    Attributes:
      name: for messages.
      command: the program, looked up beside this Python first, and its arguments.
      log: the file that both its streams are appended to.
      environment: variables beside this process's own.
      guard: ends it when this process is gone.
      patience: seconds of ends at once before it is given up, at least.
      without: variables of this process that it does not get, by the start of their names.
    """

    name: str
    command: Sequence[str]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    guard: "Guard | None" = None
    patience: float = 0.0
    without: str = "\0"
    _process: subprocess.Popen | None = None
    _started: float = 0.0
    _starts: int = 0
    _due: float = 0.0
    _failing_since: float = 0.0

    def start(self) -> None:
        scripts = sysconfig.get_path("scripts")
        path = os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)])
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(self.without)}
        program, *rest = self.command
        beside = Path(scripts) / program
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(beside) if beside.exists() else program, *rest],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**inherited, "PATH": path, **self.environment},
                start_new_session=True,  # Ctrl-C is for this process, which stops the others
            )
        if self.guard is not None:
            self.guard.watch(self._process.pid)
        self._started = time.monotonic()
        self._starts += 1

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def keep(self) -> bool:
        """Starts it again if it has ended; whether it had.

        Raises:
          ChildError: it ends at once, again and again.
        """
        now = time.monotonic()
        if self.alive:
            if now - self._started > AT_ONCE:
                self._starts = 1
            return False
        if not self._due:
            if self._starts == 1:
                self._failing_since = now
            if self._starts >= MOST_STARTS and now - self._failing_since >= self.patience:
                raise ChildError(f"{self.name} does not stay alive: {complaint(self.log)}")
            self._end_group()
            self._due = now + min(FIRST_REST * 2 ** (self._starts - 1), LONGEST_REST)
        if now < self._due:
            return False
        self._due = 0.0
        self.start()
        return True

    def ask_to_stop(self) -> None:
        """Asks it, and all that it has started, to end."""
        if self._process is not None:
            self._end_group(signal.SIGTERM)

    def stop(self) -> None:
        """Ends it with all that it has started; what was asked before has some seconds for it."""
        if self._process is None:
            return
        self.ask_to_stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        self._end_group()
        self._process.wait()
        self._process = None

    def _end_group(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal to it and all that it has started and that is left."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)
        if number is signal.SIGKILL and self.guard is not None:
            self.guard.forget(self._process.pid)


# Ends all groups of processes that it was told of when its input does.
_GUARD = """
import os, signal, sys, time
groups = set()
for line in sys.stdin:
    group = int(line)
    groups.add(group) if group > 0 else groups.discard(-group)
for number in (signal.SIGTERM, signal.SIGKILL):
    for group in groups:
        try:
            os.killpg(group, number)
        except OSError:
            pass
    time.sleep(2)
"""


class Guard:
    """A small process that ends the others when this one is gone, however it went."""

    def __enter__(self) -> "Guard":
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", _GUARD],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self

    def watch(self, group: int) -> None:
        """Takes note of one more group."""
        self._tell(group)

    def forget(self, group: int) -> None:
        """A group has ended, and its number may become another's."""
        self._tell(-group)

    def _tell(self, group: int) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{group}\n".encode())
            self._process.stdin.flush()

    def __exit__(self, *_) -> None:
        """All has been stopped: nothing is left to end."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()


@contextlib.contextmanager
def stopped_together(children: Sequence[Child]) -> Iterator[None]:
    """Starts processes, in this order, and stops all of them at the end, in the opposite order."""
    with Guard() as guard:
        try:
            for child in children:
                child.guard = guard
                child.start()
            yield
        finally:
            for child in reversed(children):
                child.ask_to_stop()
            for child in reversed(children):
                child.stop()


def complaint(log: Path) -> str:
    """The last line of a log that tells of an error, else the last that says anything."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    told = [line for line in (_COLOURS.sub("", line).strip() for line in lines) if line]
    wrong = [line for line in told if re.search("error|fail", line, re.IGNORECASE)]
    if not told:
        return f"it says nothing in {log}"
    return f"{(wrong or told)[-1][:200]} (all of it in {log})"
