"""Flower's programs as children, and its app that says no more than where the code is installed.

SuperLink, SuperNodes and runs are the open-source ones, 1.42. Nothing is sent home, nothing is
installed when a run starts.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import NamedTuple

from fedrevive_jax.errors import ConfigError, UserError
from fedrevive_jax.live.children import Child, complaint
from fedrevive_jax.live.wire import SOCKET

LOOPBACK = "127.0.0.1"
# Variables that change what Flower's programs do, such as where they listen.
FLOWERS_OWN = "FLWR_"
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    # How often a SuperExec looks for work; by default every second.
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
    "FLWR_LOG_LEVEL": "WARNING",  # else a line for every request
    # What goes to this machine goes through no proxy.
    **{
        name: ",".join(filter(None, (os.environ.get(name), LOOPBACK, "localhost")))
        for name in ("NO_PROXY", "no_proxy")
    },
}
ANSWERS_IN = 120.0
_CONNECTION = "federation"
_APP = {
    "pyproject.toml": """[project]
name = "fedrevive"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedrevive"

[tool.flwr.app.components]
serverapp = "fedrevive_app.server:app"
clientapp = "fedrevive_app.client:app"

[tool.flwr.app.config]
folder = ""
""",
    "fedrevive_app/__init__.py": "",
    "fedrevive_app/server.py": "from fedrevive_jax.live.flower import server_app\n\n"
    "app = server_app.app\n",
    "fedrevive_app/client.py": "from fedrevive_jax.live.flower import client_app\n\n"
    "app = client_app.app\n",
}


class FlowerError(UserError):
    """One of Flower's programs says no."""


class Certificates(NamedTuple):
    """Files of a server that speaks TLS."""

    authority: Path
    certificate: Path
    key: Path


def free_port() -> int:
    """A port of the loopback device that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


def superlink(folder: Path, port: int, certificates: Certificates | None = None) -> Child:
    """A SuperLink on loopback alone, whose database outlives it.

    Without certificates it speaks plain text and takes any node; with them it takes registered keys
    alone.
    """
    security = ["--insecure"]
    if certificates is not None:
        security = [
            "--ssl-ca-certfile", str(certificates.authority),
            "--ssl-certfile", str(certificates.certificate),
            "--ssl-keyfile", str(certificates.key),
            "--enable-supernode-auth",
        ]  # fmt: skip
    command = [
        "flower-superlink", *security, "--host", LOOPBACK, "--port", str(port),
        "--database", str(folder / "superlink.db"), "--disable-runtime-dependency-installation",
    ]  # fmt: skip
    environment = {**QUIET, "FLWR_HOME": str(folder / "superlink")}
    log = folder / "superlink.log"
    return Child("Flower's SuperLink", command, log, environment, without=FLOWERS_OWN)


def supernode(
    folder: Path,
    name: str,
    address: str,
    trainer: Path,
    authority: Path | None = None,
    key: Path | None = None,
) -> Child:
    """A SuperNode whose messages go to a trainer's socket.

    Args:
      folder: for its log and its files.
      name: tells it from others on this machine.
      address: host:port of the SuperLink, or of what stands before it.
      trainer: the socket.
      authority: certificate that the other side must show to be signed by; None: plain text.
      key: the node's private key.
    """
    security = ["--insecure"] if authority is None else ["--root-certificates", str(authority)]
    if key is not None:
        security += ["--auth-supernode-private-key", str(key)]
    command = [
        "flower-supernode", *security, "--superlink", address,
        "--host", LOOPBACK, "--port", str(free_port()),
    ]  # fmt: skip
    environment = {**QUIET, "FLWR_HOME": str(folder / name), SOCKET: str(trainer)}
    log = folder / f"{name}.log"
    return Child(f"SuperNode {name}", command, log, environment, without=FLOWERS_OWN)


class Control:
    """Flower's command line, for one SuperLink on this machine."""

    def __init__(self, folder: Path, port: int, authority: Path | None = None):
        """Writes Flower's own configuration and the app into a folder."""
        self._folder = folder
        home = folder / "control"
        security = "insecure = true"
        if authority is not None:
            security = f"root-certificates = {json.dumps(str(authority))}"
        texts = {
            home / "config.toml": (
                f'[superlink]\ndefault = "{_CONNECTION}"\n\n[superlink.{_CONNECTION}]\n'
                f'address = "{LOOPBACK}:{port}"\n{security}\n'
            ),
            **{folder / "app" / name: text for name, text in _APP.items()},
        }
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(FLOWERS_OWN)}
        self._environment = {**kept, **QUIET, "FLWR_HOME": str(home), "NO_COLOR": "1"}

    def run(self, folder: Path) -> str:
        """Starts a run that is told and watched through a folder, see `live.serving`; its id.

        Raises:
          FlowerError: it cannot be started.
        """
        config = f"folder={json.dumps(str(folder))}"
        app = str(self._folder / "app")
        return self._ask("run", app, _CONNECTION, "--run-config", config)["run-id"]

    def stop(self, run: str) -> None:
        """Ends a run; one that is over is left alone."""
        with contextlib.suppress(FlowerError):
            self._ask("stop", run, _CONNECTION)

    def register(self, public_key: Path) -> None:
        """Lets the owner of a key in; a key that is registered is left as it is.

        Raises:
          ConfigError: it is no key that Flower takes.
        """
        try:
            self._ask("supernode", "register", str(public_key), _CONNECTION)
        except FlowerError as error:
            if "already" not in str(error).lower():
                reason = f"is no key that Flower takes ({error})"
                raise ConfigError("clients", public_key, reason) from None

    def _ask(self, *arguments: str) -> dict:
        program = Path(sysconfig.get_path("scripts")) / "flwr"
        try:
            done = subprocess.run(
                [sys.executable, str(program), *arguments, "--format", "json"],
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
                env=self._environment,
                timeout=ANSWERS_IN,
            )
        except subprocess.TimeoutExpired:
            raise FlowerError(f"flwr {arguments[0]}: no answer in {ANSWERS_IN:.0f} s") from None
        answer = _last_json(done.stdout)
        if done.returncode or not answer.get("success", True):
            told = answer.get("error-message") or done.stderr or done.stdout
            reason = " ".join(told.split())[:300]
            raise FlowerError(f"flwr {' '.join(arguments[:2])}: {reason}")
        return answer


def wait_until_listening(child: Child, port: int, seconds: float = 60.0) -> None:
    """Waits until a child takes connections.

    Raises:
      FlowerError: it ends, or does not in time.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until and child.alive:
        with socket.socket() as probe:
            probe.settimeout(1.0)
            if probe.connect_ex((LOOPBACK, port)) == 0:
                return
        time.sleep(0.1)
    raise FlowerError(f"{child.name} does not start: {complaint(child.log)}")


def _last_json(text: str) -> dict:
    """The JSON object in what a program printed, whatever stands before it."""
    start = text.find("{")
    try:
        found = json.loads(text[start:]) if start >= 0 else {}
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}
