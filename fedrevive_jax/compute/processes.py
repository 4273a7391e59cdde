"""Several processes that compute together, on one host or on many.

Every process runs the same program on the same data and holds the same state; only the first one
touches the run's folder. What it finds there, errors included, it shares with the others.
"""

import logging
import os
import pickle
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from fedrevive_jax.errors import ConfigError, UserError

_LOG = logging.getLogger(__name__)

MODES = ("auto", "on", "off")
# Seconds of waiting for other processes after which it is told.
TOLD_AFTER = 5.0
# Bytes that travel in one call; a longer message takes several calls of one compiled program.
CHUNK = 2**24
SHORTEST = 2**10
MESSAGE = 1000
# How the runtime's errors begin when an exchange with another process fails. The last two begin
# others, too; an exchange is told by who carries it.
LOST = ("UNAVAILABLE:", "DEADLINE_EXCEEDED:", "ABORTED:")
LOST_IF_CARRIED = ("UNKNOWN:", "INTERNAL:")
CARRIERS = ("gloo", "nccl", "coordination", "heartbeat", "connection", "peer")


def join(
    mode: str,
    coordinator_address: str | None = None,
    num_processes: str | None = None,
    process_id: str | None = None,
    timeout: int = 300,
) -> None:
    """Joins the processes of a run; to be called before JAX is used for anything else.

    Args:
      mode: `on`; `off`; `auto`, which is on where jax recognises a cluster (TPU pod, SLURM, Open
        MPI, Kubernetes), or where the address is given, here or as JAX_COORDINATOR_ADDRESS.
      coordinator_address: host:port of process 0.
      num_processes, process_id: how many there are, and which this one is; like the address, needed
        only where the cluster does not tell.
      timeout: seconds to wait for the others at the start, and for a sign of life later.

    Raises:
      ConfigError: a value is not allowed, or the cluster does not tell what is not given.
    """
    if mode not in MODES:
        raise ConfigError("distributed", mode, f"must be one of {', '.join(MODES)}")
    given: dict[str, Any] = {
        "coordinator_address": coordinator_address,
        "num_processes": _whole("num_processes", num_processes),
        "process_id": _whole("process_id", process_id),
    }
    given = {name: value for name, value in given.items() if value is not None}
    if mode == "off":
        if given:
            name, value = next(iter(given.items()))
            raise ConfigError(name, value, "needs distributed=auto or on")
        return
    address = given.get("coordinator_address", os.environ.get("JAX_COORDINATOR_ADDRESS"))
    host, _, port = (address or "").rpartition(":")
    if address is not None and not (host and port.isdecimal()):
        raise ConfigError("coordinator_address", address, "must be host:port")
    alone = address is None and not given
    if mode == "auto" and alone and os.environ.get("SLURM_NTASKS") == "1":
        return  # jax would give this single task a single one of its GPUs

    import jax

    def initialize() -> None:
        # JAX's own client ends the process with a C++ stack trace when its time is up. So it gets
        # more, and the time is kept here.
        jax.distributed.initialize(
            **given, initialization_timeout=2 * timeout, heartbeat_timeout_seconds=timeout
        )

    count = f" ({given['num_processes']} in all)" if "num_processes" in given else ""
    others = f"the other processes{count}" + (f" at {address}" if address else "")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about clusters that this may or may not be
            _in_time(
                initialize,
                timeout,
                f"waiting up to {timeout} s for {others}; each has to be started, or do without by "
                "distributed=off",
            )
    except TimeoutError:
        raise ConfigError(
            "distributed",
            mode,
            f"{others} were not there after {timeout} s; start each of them, or do without by "
            "distributed=off",
        ) from None
    except ValueError as error:
        if mode == "auto" and alone:
            return
        raise ConfigError(
            "distributed",
            mode,
            f"{_line(error)} (no cluster was recognised that tells; give "
            "`coordinator_address`, `num_processes` and `process_id`)",
        ) from None
    except RuntimeError as error:
        raise ConfigError("distributed", mode, f"{_line(error)}") from None


def _in_time(function: Callable[[], None], timeout: float, waiting: str) -> None:
    """Calls a function that may wait for others; a long wait is told in a line.

    It runs in a thread, so that Ctrl-C and the end of the time are heard here meanwhile.

    Raises:
      TimeoutError: it has not come back in time. It goes on until the process ends.
    """
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    thread.join(min(TOLD_AFTER, timeout))
    if thread.is_alive():
        _LOG.warning("%s", waiting)
        thread.join(max(timeout - TOLD_AFTER, 0.0))
    if thread.is_alive():
        raise TimeoutError
    if errors:
        raise errors[0]


def joined() -> bool:
    """Whether this process has joined others; does not touch a device."""
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this is the process that reads and writes the run's folder."""
    import jax

    return jax.process_index() == 0


def is_lost_contact(error: Exception) -> bool:
    """Whether an error of JAX's runtime says that another process is gone."""
    text = str(error)
    carried = any(word in text.lower() for word in CARRIERS)
    return joined() and (text.startswith(LOST) or (text.startswith(LOST_IF_CARRIED) and carried))


def leave(status: int) -> None:
    """Ends this process at once if it has joined others, after an error.

    Python's own way out would wait for the others, who wait for this one in the next exchange.
    """
    if joined():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def first(function: Callable[[], Any]) -> Any:
    """What the first process's function gives, on every process.

    Args:
      function: run by the first process alone. Its result is plain, with arrays of NumPy.

    Raises:
      UserError, OSError: what it raised there is raised on every process.
    """
    import jax

    if jax.process_count() == 1:
        return function()
    message, outcome = b"", (None, None)
    if is_first():
        try:
            outcome = function(), None
        except (UserError, OSError) as error:
            outcome = None, error
        message = pickle.dumps(outcome, protocol=5)  # arrays go in without a copy on the way
    received = _broadcast(message)
    result, error = outcome if is_first() else pickle.loads(received)
    if error is not None:
        raise error
    return result


def together(function: Callable[[], Any]) -> Any:
    """What every process's own function gives, once it has succeeded on all of them.

    Raises:
      UserError: its own, or that it failed on another process.
    """
    import jax

    if jax.process_count() == 1:
        return function()
    result = error = None
    try:
        result = function()
    except UserError as raised:
        error = raised
    for process, message in enumerate(_gather(str(error) if error else "")):
        if error is None and message:
            raise UserError(f"process {process} of {jax.process_count()}: {message}")
    if error is not None:
        raise error
    return result


def agree(describe: Callable[[], dict[str, Any]]) -> None:
    """Checks that what every process describes, plain values by name, is the same on all.

    Raises:
      UserError: something is not; on every process.
    """
    import jax

    if jax.process_count() == 1:
        return
    own = describe()
    expected = first(lambda: own)

    def check():
        for name, value in own.items():
            if value != expected[name]:
                raise ConfigError(name, None, f"{value!r}, but {expected[name]!r} on process 0")

    together(check)


def _gather(text: str) -> list[str]:
    """Every process's text, cut to what travels at once."""
    from jax.experimental import multihost_utils

    own = text.encode()[:MESSAGE].ljust(MESSAGE, b"\0")
    rows = multihost_utils.process_allgather(np.frombuffer(own, np.uint8))
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in np.asarray(rows)]


def _broadcast(message: bytes) -> bytes | bytearray:
    """The first process's message, on every process; itself on the first."""
    from jax.experimental import multihost_utils

    def send(own: bytes) -> np.ndarray:
        return np.asarray(multihost_utils.broadcast_one_to_all(np.frombuffer(own, np.uint8)))

    length = int.from_bytes(send(len(message).to_bytes(8, "little")).tobytes(), "little")
    # A few sizes, so that few programs are compiled.
    chunk = min(CHUNK, max(SHORTEST, 1 << (length - 1).bit_length()))
    received = bytearray(0 if is_first() else length)
    for start in range(0, length, chunk):
        part = send(message[start : start + chunk].ljust(chunk, b"\0"))
        if not is_first():
            received[start : start + chunk] = part[: length - start].tobytes()
    return message if is_first() else received


def _whole(name: str, value: str | None) -> int | None:
    if value is None:
        return None
    if not str(value).isdecimal():
        raise ConfigError(name, value, "must be a whole number")
    return int(value)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
