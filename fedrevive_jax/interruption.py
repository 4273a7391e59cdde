"""SIGTERM and SIGINT: save and leave in time, whatever the process is doing.

Python runs a signal's handler in the main thread between two steps of the interpreter, and while
JAX compiles or computes there is none for minutes. So the handlers here do nothing. The system's
own part of the handler writes the signal's number into a pipe at once; a thread reads it, asks the
run to save at the next arrival, and ends the process itself when that does not come in time. Then
the newest checkpoint on disk counts, and the same command repeats what came after it.
"""

import os
import select
import signal
import sys
import threading
import time

from fedrevive_jax.config import UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_DONE = b"\0"  # in the pipe: the watch is over


class InterruptedRunError(UserError):
    """A run has saved and stopped because it was asked to."""


class Interruption:
    """Watches for the signals while its context is open. For programs, not for libraries.

    A second signal ends the process at once.
    """

    def __init__(self, grace: float):
        """To be entered in the main thread.

        Args:
          grace: seconds from the first signal to the end of the process at the latest.
        """
        self._grace = grace
        self._signal: signal.Signals | None = None

    @property
    def requested(self) -> bool:
        """Whether the run shall save and stop."""
        return self._signal is not None

    @property
    def status(self) -> int:
        """Exit status as shells give it: 143 after SIGTERM, 130 after SIGINT, 0 after none."""
        return 0 if self._signal is None else 128 + self._signal

    def __enter__(self) -> "Interruption":
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._old_descriptor = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._old_handlers = {number: signal.signal(number, _ignore) for number in SIGNALS}
        self._thread = threading.Thread(target=self._watch, name="interruption", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_descriptor)
        os.write(self._writing, _DONE)
        self._thread.join()
        os.close(self._reading)
        os.close(self._writing)

    def _watch(self) -> None:
        while (byte := os.read(self._reading, 1)) != _DONE:
            if byte[0] in SIGNALS:
                break  # other signals may have handlers, too
        else:
            return
        self._signal = signal.Signals(byte[0])
        end = time.monotonic() + self._grace
        while select.select([self._reading], [], [], max(end - time.monotonic(), 0))[0]:
            byte = os.read(self._reading, 1)
            if byte == _DONE:
                return
            if byte[0] in SIGNALS:
                self._leave(f"a second signal ({signal.Signals(byte[0]).name})")
        self._leave(f"{self._grace:g} s after {self._signal.name}, inside a long computation")

    def _leave(self, why: str) -> None:
        words = f"stopped by {why}; the same command continues from the newest checkpoint, if any\n"
        os.write(sys.stderr.fileno(), words.encode())
        os._exit(self.status)


def _ignore(number, frame) -> None:
    del number, frame
