"""One process at a time writes a run's folder."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from fedrevive_jax.errors import ConfigError

NAME = "run.lock"
# What a file system says that has no locks, as some network file systems have none.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Holds a run's folder; the system lets go of it when the process dies, however it dies.

    Where the file system has no locks, the process that the file names is looked for instead.

    Raises:
      ConfigError: another process holds it.
    """
    path = folder / NAME
    with path.open("a+b") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError("workdir", folder, _in_use(_holder(path))) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            _check_holder(folder, _holder(path))
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
        _put(stream, json.dumps(me).encode())
        try:
            yield
        finally:
            # The file stays: another process may be opening it.
            with contextlib.suppress(OSError):
                _put(stream, b"")


def is_held(folder: Path) -> bool:
    """Whether a process holds a folder now. To be asked where none is about to take it."""
    try:
        with (folder / NAME).open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            return False  # there is no such file
        holder = _holder(folder / NAME)
        return bool(holder) and _is_alive(holder["pid"])
    return False


def _put(stream: Any, text: bytes) -> None:
    stream.truncate(0)
    stream.write(text)
    stream.flush()


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _holder(path: Path) -> dict[str, Any]:
    """What the file says of the process that wrote it; {} where it says nothing."""
    try:
        holder = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    known = isinstance(holder, dict) and holder.keys() == {"pid", "host", "since"}
    known = known and isinstance(holder["pid"], int)
    return holder if known else {}


def _in_use(holder: dict[str, Any]) -> str:
    who = (
        f"process {holder['pid']} on {holder['host']} since {holder['since']}"
        if holder
        else "another process"
    )
    return f"is in use by {who}; wait for it or give another folder"


def _check_holder(folder: Path, holder: dict[str, Any]) -> None:
    if not holder:
        return
    if holder["host"] == socket.gethostname() and not _is_alive(holder["pid"]):
        _LOG.warning("workdir=%s: taken over from process %s", folder, holder["pid"])
        return
    raise ConfigError(
        "workdir",
        folder,
        f"{_in_use(holder)}, or delete {NAME} if that process is gone (this file system "
        "has no locks that would tell)",
    )


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
