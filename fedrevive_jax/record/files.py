"""The record of a run: a folder of plain files that stay readable at any moment.

config.json, metrics.jsonl, arrivals.jsonl, summary.json, TensorBoard events, pictures, checkpoints,
and what `derived` keeps.
"""

import errno
import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from fedrevive_jax.config import DEVICE_FIELDS, INPUT_FIELDS, LOCATION_FIELDS, Config
from fedrevive_jax.errors import ConfigError, UserError

CONFIG = "config.json"
METRICS = "metrics.jsonl"
ARRIVALS = "arrivals.jsonl"
SUMMARY = "summary.json"
EVENTS = "tensorboard"


class RecordError(UserError):
    """The record of a run cannot be written any more."""


def write_whole(path: Path, fill: Callable[[BinaryIO], Any]) -> None:
    """Writes a whole file or none: `fill` writes into a neighbour, which is then renamed."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as stream:
        fill(stream)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Writes a whole JSON file or none."""
    text = json.dumps(value, indent=2) + "\n"
    write_whole(path, lambda stream: stream.write(text.encode()))


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
      ConfigError: it is missing or not JSON; the message names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = f"{path.name} cannot be read ({error})"
        raise ConfigError("workdir", path.parent, reason) from None


class Rows:
    """A file of JSON rows; `flush` writes the appended ones and makes them durable.

    Rows are written whole, many at a time, so that whoever reads the file finds complete lines.
    What has been written is never changed, so its checksum goes along.
    """

    def __init__(self, path: Path, size: int = 0):
        """Opens the file and cuts it to `size` bytes, the end of the last row that counts.

        Raises:
          ConfigError: the file is shorter than that: rows that counted are gone.
        """
        self._path = path
        self._waiting: list[bytes] = []
        self._stream = path.open("a+b", buffering=0)
        if self._stream.seek(0, os.SEEK_END) < size:
            self._stream.close()
            raise ConfigError(
                "workdir",
                path.parent,
                f"{path.name} is shorter than its checkpoint says; "
                "use overwrite=True to start afresh",
            )
        self._stream.truncate(size)
        self._stream.seek(0)
        self._digest = hashlib.file_digest(self._stream, "sha256")

    def append(self, row: dict[str, Any]) -> None:
        """Appends one row; numbers that are not finite become null, as JSON has none."""
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        self._waiting.append((json.dumps(clean) + "\n").encode())

    def flush(self) -> dict[str, Any]:
        """Makes all rows durable and returns what `archive.check_start` takes: size and sha256.

        Raises:
          OSError: they cannot be written, or the file has been removed.
        """
        text, self._waiting = b"".join(self._waiting), []
        self._digest.update(text)
        rest = memoryview(text)
        while rest:
            rest = rest[self._stream.write(rest) :]
        os.fsync(self._stream.fileno())
        state = os.fstat(self._stream.fileno())
        if state.st_nlink == 0:
            raise FileNotFoundError(errno.ENOENT, "removed while the run goes on", str(self._path))
        return {"size": state.st_size, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._stream.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All complete rows of a file of JSON rows; [] when there is none.

    Raises:
      ConfigError: a row is no JSON object any more; the message names the line.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is incomplete
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ConfigError(
                "workdir",
                path.parent,
                f"{path.name} line {number} is damaged; use overwrite=True to start afresh",
            )
        rows.append(row)
    return rows


def configured_differently(run_dir: Path, config: Config) -> list[str]:
    """How the configuration recorded in a folder differs from `config`, one line a field.

    Two paths are the same where they lead to the same place.
    """
    recorded = read_json(run_dir / CONFIG)
    if not isinstance(recorded, dict):
        raise ConfigError("workdir", run_dir, f"{CONFIG} is not a configuration")
    wanted = config.as_dict()
    names = sorted((set(recorded) | set(wanted)) - {*LOCATION_FIELDS, *DEVICE_FIELDS})

    def meant(values: dict[str, Any], name: str) -> Any:
        value = values.get(name)
        if name in INPUT_FIELDS and isinstance(value, str) and value:
            return os.path.realpath(value)
        return value

    return [
        f"`{name}`: {recorded.get(name)!r} in the record, {wanted.get(name)!r} now"
        for name in names
        if meant(recorded, name) != meant(wanted, name)
    ]
