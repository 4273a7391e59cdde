"""A live run from its first evaluation to its summary, told and watched through a folder.

    order.json     what to run, written by whoever starts the run
    status.json    where it stands, written by the run
    stop           asks it to save and stop

The process that runs the server is started by others, Flower for one, who pass on no more than the
name of a folder.
"""

import contextlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fedrevive_jax.clock import delays
from fedrevive_jax.config import Config
from fedrevive_jax.errors import ConfigError, FileError, UserError
from fedrevive_jax.live.coordinator import Arrived, Times
from fedrevive_jax.live.federation import Federation
from fedrevive_jax.live.link import Link
from fedrevive_jax.record import files, lock
from fedrevive_jax.record.interruption import InterruptedRunError
from fedrevive_jax.running import runner

ORDER, STATUS, STOP, BEGUN = "order.json", "status.json", "stop", "begun"
DELAYS = "delays.csv"
RUNNING, FINISHED, STOPPED, FAILED = "running", "finished", "stopped", "failed"
TELL_EVERY = 0.5

_LOG = logging.getLogger(__name__)


class Order(NamedTuple):
    """What to run.

    Attributes:
      config: with a workdir.
      times: how long clients are waited for.
      save_seconds: seconds between two checkpoints.
      overwrite: start afresh.
      believes_names: see `Coordinator`.
    """

    config: Config
    times: Times
    save_seconds: float
    overwrite: bool = False
    believes_names: bool = False

    def write(self, folder: Path) -> None:
        files.write_json(
            folder / ORDER,
            {**self._asdict(), "config": self.config.as_dict(), "times": self.times._asdict()},
        )

    @classmethod
    def read(cls, folder: Path) -> "Order":
        given = json.loads((folder / ORDER).read_text())
        return cls(
            **{**given, "config": Config(**given["config"]), "times": Times(**given["times"])}
        )


class StopFile:
    """Asks a run to stop as soon as a file is there."""

    def __init__(self, path: Path):
        self._path = path

    @property
    def requested(self) -> bool:
        return self._path.exists()

    def share(self) -> None:
        """Nobody computes beside this process."""


class Trace:
    """The delays of a run as it went, which `delays=trace` replays.

    Nobody knows how long a message was under way each time: clocks of two machines differ. So what
    is left of a round trip beside the training is told as half a download and half an upload.
    """

    def __init__(self, path: Path):
        """Goes on after the last whole row."""
        self._path = path
        self._stream: BinaryIO | None = path.open("a+b", buffering=0)
        self._stream.seek(0)
        whole = self._stream.read().rpartition(b"\n")[0]
        self._stream.truncate(len(whole) + 1 if whole else 0)
        if not whole:
            self._write(",".join((delays.CLIENT, *delays.COLUMNS)))

    def add(self, arrived: Arrived) -> None:
        training = max(arrived.training, 1e-3)
        half = max(arrived.round_trip - training, 0.0) / 2
        self._write(f"{arrived.receipt.client},{half:.4f},{training:.4f},{half:.4f}")

    def _write(self, row: str) -> None:
        """A row, whole or at the end: nothing is missing in the midst."""
        if self._stream is None:
            return
        text = f"{row}\n".encode()
        try:
            if self._stream.write(text) == len(text):
                return
            reason = "no room"
        except OSError as error:
            reason = error.strerror or str(error)
        _LOG.warning("%s: cannot be written any more (%s)", self._path, reason)
        self.close()

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream = None


class _Told:
    """Tells where a run stands, seldom enough."""

    def __init__(self, folder: Path):
        self._folder, self._last = folder, 0.0

    def now(self, state: str, **facts: Any) -> None:
        self._last = time.monotonic()
        status = {"state": state, "pid": os.getpid(), **facts}
        try:
            files.write_json(self._folder / STATUS, status)
        except OSError as error:  # a full disk: the run itself tells what that means for it
            _LOG.error("%s: cannot be written (%s)", self._folder / STATUS, error.strerror)

    def soon(self, state: str, **facts: Any) -> None:
        if time.monotonic() - self._last >= TELL_EVERY:
            self.now(state, **facts)


def serve(folder: Path, link: Link) -> None:
    """Runs what a folder says over a link; ends when that is done, stopped or impossible."""
    told = _Told(folder)
    with contextlib.ExitStack() as stack:
        try:
            # Tells whoever looks that this process lives.
            stack.enter_context(lock.exclusive(folder))
            order = Order.read(folder)
            told.now(RUNNING, line="getting ready")
            result = _run(order, folder, link, told, stack)
            told.now(FINISHED, summary=result.summary, resumed=result.resumed_version)
        except InterruptedRunError as error:
            told.now(STOPPED, line=str(error))
        except UserError as error:
            _LOG.error("error: %s", error)
            field = None
            if isinstance(error, ConfigError) and not isinstance(error, FileError):
                field = (error.field, str(error.value), error.reason)
            told.now(FAILED, line=str(error), field=field)
        except OSError as error:
            line = f"{error.filename or folder}: {error.strerror or error}"
            _LOG.error("error: %s", line)
            told.now(FAILED, line=line, field=None)


def _run(
    order: Order, folder: Path, link: Link, told: _Told, stack: contextlib.ExitStack
) -> runner.Result:
    # A run that has got anywhere is continued after a crash, not started afresh once more.
    begun = folder / BEGUN
    made: list[Federation] = []
    traces: list[Trace] = []

    def note(arrived: Arrived) -> None:
        federation = made[0]
        if not traces:  # the run's folder is this run's by now
            begun.touch()
            traces.append(Trace(federation.config.run_dir / DELAYS))
            stack.callback(traces[0].close)
        traces[0].add(arrived)
        at_work, *_ = federation.slots
        told.soon(
            RUNNING,
            line=f"{federation.position} arrivals, version {federation.server.version}, "
            f"{len(federation.registry.seats)} clients, {at_work} at work",
            version=federation.server.version,
            arrivals=federation.position,
        )

    def make(config, dataset, model, derived) -> Federation:
        federation = Federation(
            config, dataset, model, derived,
            link=link, times=order.times, believes_names=order.believes_names, on_arrival=note,
        )  # fmt: skip
        made.append(federation)
        stack.callback(federation.close)
        told.now(RUNNING, line="waiting for clients")
        return federation

    return runner.run(
        order.config,
        keep_record=True,
        overwrite=order.overwrite and not begun.exists(),
        interruption=StopFile(folder / STOP),
        make=make,
        save_seconds=order.save_seconds,
    )
