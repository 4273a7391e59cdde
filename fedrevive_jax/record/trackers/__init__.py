"""Where a run can be followed beside its record: TensorBoard, Weights & Biases, MLflow.

A tracker is never what a run depends on: one that fails is told once and left out from then on.
"""

import contextlib
import importlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fedrevive_jax.config import Config
from fedrevive_jax.errors import ConfigError, UserError
from fedrevive_jax.record import files

# What trackers keep in a run's folder: which run of theirs it is, and how much they have.
STATE = "trackers.json"
# tracker -> the library that it needs; a module of this package has the tracker's name.
LIBRARIES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}

_LOG = logging.getLogger(__name__)


class Followed(NamedTuple):
    """A run as a tracker is told of it.

    Attributes:
      folder: of its record.
      name: for people.
      config: all settings.
      id: what `Tracker.id` was when it was opened before; "" the first time.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    id: str


class Tracker(Protocol):
    """What a module of this package opens: `create(followed)` gives one.

    Attributes:
      id: names the same run when it is opened again; "" where every opening begins anew, and then
        all rows are told again.
    """

    id: str

    def add(self, values: Mapping[str, float], version: int) -> None:
        """Takes finite numbers at a global version."""

    def flush(self) -> None:
        """Hands on what was added."""

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """The end: of the run with its summary, or of this process alone, with None."""


def check(config: Config) -> None:
    """Whether the libraries of the trackers are there.

    Raises:
      ConfigError: one is not.
    """
    for name in config.tracker_names:
        if find_spec(LIBRARIES[name]) is None:
            raise ConfigError(
                "trackers",
                config.trackers,
                f"{name} is not installed: python -m pip install -e '.[{name}]'",
            )


class Trackers:
    """All trackers of a run. None of them can end it.

    Rows come in the same order whenever a run is opened, first those that count already. What a
    tracker has got in an earlier process, or before a run was taken back to its checkpoint, it does
    not get twice.
    """

    def __init__(self, names: Sequence[str], folder: Path, config: Config):
        """Opens them.

        Args:
          names: see `config.TRACKERS`.
          folder: of the record.
          config: of the run.
        """
        self._folder = folder
        known = self._read()
        self._open: dict[str, Tracker] = {}
        self._sent: dict[str, int] = {}
        self._rows = 0
        for name in names:
            before = known.get(name, {})

            def create(name: str = name, before: dict[str, Any] = before) -> None:
                module = importlib.import_module(f"{__name__}.{name}")
                settings = config.as_dict()
                followed = Followed(folder, config.run_dir.name, settings, before.get("id", ""))
                tracker = module.create(followed)
                self._open[name] = tracker
                self._sent[name] = before.get("sent", 0) if tracker.id == followed.id else 0

            self._try(name, create)

    def add(self, row: Mapping[str, Any]) -> None:
        """Tells the finite numbers of a row of metrics.jsonl, at its version."""
        if row["kind"] == "pool":  # a count for each class
            return
        self._rows += 1
        prefix = "" if row["kind"] == "evaluation" else "dfkd/"
        values = {
            prefix + name: float(value)
            for name, value in row.items()
            if name not in ("kind", "version") and value is not None and math.isfinite(value)
        }
        for name, tracker in list(self._open.items()):
            if self._rows > self._sent[name]:
                self._try(name, lambda t=tracker: t.add(values, row["version"]))

    def flush(self) -> None:
        for name, tracker in list(self._open.items()):
            self._try(name, tracker.flush)
        self._write()

    def close(self, summary: Mapping[str, Any] | None = None) -> None:
        """Ends them; the second call does nothing."""
        self._write()
        for name, tracker in list(self._open.items()):
            self._try(name, lambda t=tracker: t.close(summary))
        self._open.clear()

    def _try(self, name: str, function: Callable[[], None]) -> None:
        try:
            function()
        except Exception as error:  # whatever a library of others raises
            told = str(error).strip().splitlines() or [type(error).__name__]
            _LOG.warning("the tracker %s is left out from now on (%s)", name, told[0])
            self._open.pop(name, None)

    def _read(self) -> dict[str, Any]:
        if not (self._folder / STATE).exists():
            return {}
        with contextlib.suppress(UserError):
            found = files.read_json(self._folder / STATE)
            if isinstance(found, dict):
                return found
        return {}

    def _write(self) -> None:
        state = {
            name: {"id": tracker.id, "sent": max(self._rows, self._sent[name])}
            for name, tracker in self._open.items()
            if tracker.id
        }
        if state:
            # Where it cannot be written, a tracker gets rows twice after a restart, no more.
            with contextlib.suppress(OSError, UserError):
                files.write_json(self._folder / STATE, state)
