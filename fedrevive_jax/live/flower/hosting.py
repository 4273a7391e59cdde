"""A federation on Flower from this machine's side: the server with its SuperLink, or a client.

The processes, and who starts them:

    serve                       this module, `host`
      flower-superlink          on loopback; starts the process of the server for each run
      gate                      what of it can be reached from outside, see `live.flower.gate`
      trainer, flower-supernode one each for every client on this machine
    join                        this module, `join`
      trainer, flower-supernode

Whatever ends is started again. A run whose process is gone is started again, too, and continues
from the newest checkpoint.
"""

import contextlib
import dataclasses
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedrevive_jax.config import Config
from fedrevive_jax.errors import ConfigError, UserError
from fedrevive_jax.live import serving
from fedrevive_jax.live.children import Child, ChildError, complaint, stopped_together
from fedrevive_jax.live.flower import commands
from fedrevive_jax.live.flower.commands import LOOPBACK, Certificates, FlowerError
from fedrevive_jax.live.trainer import Options
from fedrevive_jax.record import lock

_LOG = logging.getLogger(__name__)
LOOK = 0.3
# A run that was started tells where it stands after so many seconds at the latest.
FIRST_WORD = 180.0
# Flower takes a node that was killed for online for up to a minute, and then lets it in again.
OFFLINE_AFTER = 75.0
# Ends of the server's process one after the other, without an arrival between them.
MOST_ENDS = 5


class Door(NamedTuple):
    """Who may come in from outside, and where.

    Attributes:
      address: (host, port) to listen at.
      files: the server's certificates, see `commands.Certificates`.
      keys: folder of the clients' public keys, *.pub.
    """

    address: tuple[str, int]
    files: Sequence[Path]
    keys: Path

    @property
    def certificates(self) -> Certificates:
        return Certificates(*self.files)


def host(
    order: serving.Order,
    state: Path,
    *,
    clients: Sequence[Options],
    door: Door | None,
    stop: Callable[[], bool],
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Serves a run to its end.

    Args:
      order: what to run.
      state: a folder for databases and logs, kept from one start to the next.
      clients: those that live on this machine.
      door: for those that do not; None: nobody comes in.
      stop: whether the run shall save and stop; asked often.
      tell: gets a line whenever there is news.

    Returns:
      What the run told last, see `serving.STATUS`.

    Raises:
      UserError: something that is needed does not start, or does not stay.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_held(state))
        for name in (serving.STATUS, serving.STOP, serving.BEGUN):
            (state / name).unlink(missing_ok=True)
        # A node without a key is another one after each start, but all are on this machine.
        order._replace(believes_names=door is None).write(state)
        port = commands.free_port()
        certificates = door.certificates if door else None
        link = commands.superlink(state, port, certificates)
        stack.enter_context(stopped_together([link]))
        commands.wait_until_listening(link, port)
        control = commands.Control(state, port, certificates.authority if certificates else None)
        kept = [link]
        if door is not None:
            for key in sorted(door.keys.glob("*.pub")):
                control.register(key)
            kept.append(_gate(state, door, port))
            stack.enter_context(stopped_together(kept[1:]))
        kept += stack.enter_context(_local_clients(state, clients, port))
        return _supervise(state, control, kept, stop, tell)


def join(
    state: Path,
    options: Options,
    address: str,
    authority: Path,
    key: Path,
    stop: Callable[[], bool],
) -> None:
    """Works for a server until it is told to stop.

    Args:
      state: a folder for logs and the socket.
      options: what this client decides itself.
      address: host:port of the server.
      authority: the certificate that signs the server's.
      key: this client's private key.
      stop: whether to leave; asked often.

    Raises:
      UserError: a process does not stay alive.
    """
    with _held(state), _sockets() as sockets:
        trainer, path = _trainer(state, sockets, "client", options)
        node = commands.supernode(state, "node", address, path, authority, key)
        node.patience = OFFLINE_AFTER
        _work(trainer, node, address, key, stop)


def _work(trainer: Child, node: Child, address: str, key: Path, stop: Callable[[], bool]) -> None:
    """Keeps a client's processes alive until it is told to stop."""
    with stopped_together([trainer, node]):
        while not stop():
            _keep([trainer])
            try:
                _keep([node])
            except ChildError as error:
                raise ChildError(
                    f"{error}; does a server listen at {address}, and is {key}.pub among its keys?"
                ) from None
            time.sleep(LOOK)


def _supervise(
    state: Path,
    control: commands.Control,
    kept: Sequence[Child],
    stop: Callable[[], bool],
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Keeps all alive until the run is over."""
    told, run, since = "", None, time.monotonic()
    ends, arrivals = 0, -1
    while True:
        if run is None:
            try:
                run = control.run(state)
            except FlowerError:  # the SuperLink may be on its way up again
                if time.monotonic() - since > FIRST_WORD:
                    raise
        status = _status(state)
        if status.get("arrivals", -1) > arrivals:
            ends, arrivals = 0, status["arrivals"]
        if status.get("state") in (serving.FINISHED, serving.STOPPED, serving.FAILED):
            return status  # the SuperLink is stopped next, and with it the run
        if (line := status.get("line", "")) and line != told:
            tell(line)
            told = line
        if stop():
            (state / serving.STOP).touch()
        _keep(kept)
        if status and not lock.is_held(state):
            # It may have said its last word in between.
            if _status(state).get("state") != serving.RUNNING:
                continue
            if stop():
                return {"state": serving.STOPPED, "line": "the server's process was gone"}
            ends += 1
            if ends > MOST_ENDS:
                raise UserError(f"the server does not stay alive: {complaint(kept[0].log)}")
            _LOG.warning("the server's process has ended; it continues from the newest checkpoint")
            (state / serving.STATUS).unlink()
            if run is not None:
                control.stop(run)
            run, since, told = None, time.monotonic(), ""
            continue
        elif not status and time.monotonic() - since > FIRST_WORD:
            raise UserError(f"the server's process says nothing: {complaint(kept[0].log)}")
        time.sleep(LOOK)


def _keep(children: Sequence[Child]) -> None:
    for child in children:
        if child.keep():
            _LOG.warning("%s had ended and was started again", child.name)


def _status(state: Path) -> dict[str, Any]:
    try:
        return json.loads((state / serving.STATUS).read_text())
    except FileNotFoundError:
        return {}


@contextlib.contextmanager
def _local_clients(state: Path, clients: Sequence[Options], port: int) -> Iterator[list[Child]]:
    """A trainer and a node for each client on this machine, where the link speaks plain text."""
    with _sockets() as sockets:
        children = []
        for number, options in enumerate(clients):
            trainer, path = _trainer(state, sockets, f"client_{number}", options)
            node = commands.supernode(state, f"node_{number}", f"{LOOPBACK}:{port}", path)
            children += [trainer, node]
        with stopped_together(children):
            yield children


@contextlib.contextmanager
def _sockets() -> Iterator[Path]:
    """A folder for sockets, whose names may not be long. Nobody else can enter it."""
    with tempfile.TemporaryDirectory(prefix="fedrevive-") as folder:
        yield Path(folder)


def _trainer(state: Path, sockets: Path, name: str, options: Options) -> tuple[Child, Path]:
    """The process that trains for a client, and its socket."""
    told = state / f"{name}.json"
    told.write_text(options.to_json())
    path = sockets / name
    command = [sys.executable, "-m", "fedrevive_jax.live.trainer", str(path), str(told)]
    return Child(f"the trainer of {name}", command, state / f"{name}.log"), path


def _gate(state: Path, door: Door, port: int) -> Child:
    command = [
        sys.executable, "-m", "fedrevive_jax.live.flower.gate",
        f"{door.address[0]}:{door.address[1]}", str(port), str(door.keys),
        *map(str, door.certificates),
    ]  # fmt: skip
    return Child("the gate", command, state / "gate.log")


@contextlib.contextmanager
def _held(state: Path) -> Iterator[None]:
    """A folder that nobody else reads, and that no other command uses.

    Raises:
      ConfigError: one does, or the folder cannot be written.
    """
    mine = state / "held"
    try:
        mine.mkdir(parents=True, exist_ok=True)
        state.chmod(0o700)
    except OSError as error:
        raise ConfigError("state_dir", state, f"cannot be written ({error.strerror})") from None
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock.exclusive(mine))
        except ConfigError as error:
            raise ConfigError("state_dir", state, error.reason) from None
        yield


def shared_between(config: Config, pauses: Sequence[float]) -> list[Options]:
    """Options of clients on this machine that share a data set between them, one for each pause."""
    config = dataclasses.replace(
        config, num_clients=len(pauses), concurrency=1, buffer_size=1, open_slots=1,
        method="fedbuff",
    )  # fmt: skip
    return [Options(config, number, pause) for number, pause in enumerate(pauses)]
