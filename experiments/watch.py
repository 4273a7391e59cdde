"""Shows a run in a browser while it goes on: python -m experiments.watch --workdir=DIR.

Serves the page that a run writes at its end, on this machine alone, made anew whenever the record
has grown; the page refreshes itself and keeps its zoom. It only reads. Ctrl-C or SIGTERM end it.
"""

import errno
import html
import socketserver
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from absl import flags

from experiments import flags as config_flags
from fedrevive_jax.config import whole_path
from fedrevive_jax.errors import ConfigError, UserError
from fedrevive_jax.record import files
from fedrevive_jax.record.interruption import Interruption

HOST = "127.0.0.1"
# What tells that a record has grown.
GROWING = (files.CONFIG, files.METRICS, files.ARRIVALS, files.SUMMARY)
NOTHING_YET = (
    '<!DOCTYPE html><meta charset="utf-8"><meta http-equiv="refresh" content="2">'
    "<title>no page yet</title><p>{}</p>"
)

WORKDIR = flags.DEFINE_string("workdir", None, "folder of a run")
PORT = flags.DEFINE_integer("port", 8600, "where to listen on this machine; 0: a free one")


class Watch(socketserver.ThreadingMixIn, HTTPServer):
    """Serves the page of one folder."""

    daemon_threads = True

    def __init__(self, folder: Path, port: int):
        """Listens at a port, 0 for a free one.

        Raises:
          OSError: it cannot.
        """
        self.folder = folder
        self._made: tuple[str, bytes] = "", b""
        self._making = threading.Lock()
        super().__init__((HOST, port), _Answer)

    def stamp(self) -> str:
        """Changes whenever the record does."""
        return "-".join(map(_state, (self.folder / name for name in GROWING)))

    def page(self) -> bytes:
        """The page as the record is now; what is wrong with the record where there is none."""
        from fedrevive_jax.pages import run

        with self._making:
            stamp = self.stamp()
            if stamp != self._made[0]:
                try:
                    text = run.page(self.folder, stamp=stamp).html()
                except (UserError, OSError) as error:
                    words = config_flags.worded(error) if isinstance(error, UserError) else error
                    text = NOTHING_YET.format(html.escape(str(words)))
                self._made = stamp, text.encode()
            return self._made[1]


def _state(path: Path) -> str:
    try:
        state = path.stat()
    except OSError:
        return ""
    return f"{state.st_size}.{state.st_mtime_ns}"


class _Answer(BaseHTTPRequestHandler):
    server: Watch  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        found = {
            "/": lambda: ("text/html", self.server.page()),
            "/stamp": lambda: ("text/plain", self.server.stamp().encode()),
        }.get(self.path)
        if found is None:
            self.send_error(404)
            return
        kind, body = found()
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


def main() -> int:
    if not WORKDIR.value:
        raise ConfigError("workdir", "", "must name the folder of a run")
    if not 0 <= PORT.value < 65536:
        raise ConfigError("port", PORT.value, "must be 0 to 65535; 0 is a free one")
    folder = Path(whole_path("workdir", WORKDIR.value))
    if not (folder / files.CONFIG).is_file():
        raise ConfigError("workdir", folder, f"must be the folder of a run, with {files.CONFIG}")
    try:
        server = Watch(folder, PORT.value)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        reason = "is in use" if error.errno == errno.EADDRINUSE else "may not be used"
        raise ConfigError("port", PORT.value, f"{reason}; give another, or 0") from None
    with server, Interruption(grace=30.0) as interruption:
        print(f"http://{HOST}:{server.server_port}/ shows {folder}; Ctrl-C ends it", flush=True)
        server.timeout = 0.2
        while not interruption.requested:
            server.handle_request()
    return interruption.status


if __name__ == "__main__":
    config_flags.run(main)
