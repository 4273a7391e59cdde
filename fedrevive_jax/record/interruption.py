"""SIGTERM and SIGINT: save and leave in time, whatever the process is doing.

Python runs a signal's handler in the main thread between two steps of the interpreter. While JAX
traces, compiles or computes there may be none for minutes, and no other thread of Python's may run
either. So the handler here only asks the run to save at its next arrival, and a small second
process sees to the time. The system's own part of the handler writes the signal's number into a
pipe at once; the second process reads it, and when the run has not ended in time, sends the same
signal again. By then that has its default action: the system ends the run. What counts is the
newest checkpoint on disk; the same command repeats what came after it.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence

from fedrevive_jax.errors import ConfigError, UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT)

# Ends when the pipe does, which is when the run does.
_TIMER = """
import os, select, signal, sys, time
run, grace = int(sys.argv[1]), float(sys.argv[2])

def heard(seconds):
    # The next of the two signals; 0 if none comes in time, None at the end of the run.
    end = time.monotonic() + seconds
    while select.select([0], [], [], max(0.0, end - time.monotonic()))[0]:
        byte = os.read(0, 1)
        if not byte:
            return None
        if byte[0] in (signal.SIGTERM, signal.SIGINT):
            return byte[0]
    return 0

YEAR = 3e7
while (first := heard(YEAR)) == 0:
    pass
if first and heard(grace) is not None:
    name = signal.Signals(first).name
    sys.stderr.write(
        f"stopped by {name} in the midst of a computation, after {grace:g} s or a second signal; "
        "the same command continues from the newest checkpoint, if there is one\\n"
    )
    sys.stderr.flush()
    for number in (first, signal.SIGKILL):
        os.kill(run, number)
        if heard(1) is None:
            break
"""


class InterruptedRunError(UserError):
    """A run has saved and stopped because it was asked to."""


class Interruption:
    """Watches for the signals while its context is open. For programs, not for libraries.

    Once a signal has come the process has to end: it is ended after the time of grace, or by a
    second signal at once, also when the context has been left.
    """

    def __init__(self, grace: float, signals: Sequence[signal.Signals] = SIGNALS):
        """To be entered in the main thread.

        Args:
          grace: seconds from the first signal to the end of the process at the latest.
          signals: those that are watched for, some of `SIGNALS`.

        Raises:
          ConfigError: no run can save in such a time.
        """
        if not 0 < grace <= 3600:
            raise ConfigError("grace", f"{grace:g}", "must be above 0 and at most 3600 seconds")
        self.grace = grace
        self._signals = signals
        self._signal: signal.Signals | None = None

    @property
    def requested(self) -> bool:
        """Whether the run shall save and stop."""
        return self._signal is not None

    def share(self) -> None:
        """Takes note that another process of the run was asked to stop, and with it this one."""
        self._signal = self._signal or signal.SIGTERM

    @property
    def status(self) -> int:
        """Exit status as shells give it: 143 after SIGTERM, 130 after SIGINT, 0 after none."""
        return 0 if self._signal is None else 128 + self._signal

    def __enter__(self) -> "Interruption":
        reading, self._writing = os.pipe()
        self._timer = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", _TIMER, str(os.getpid()), str(self.grace)],
            stdin=reading,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the run
        )
        os.close(reading)
        os.set_blocking(self._writing, False)
        self._pass_on = _handler_of_jax()
        self._old_descriptor = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._old_handlers = {number: signal.signal(number, self._note) for number in self._signals}
        for number in self._signals:
            _once(number)
        return self

    def __exit__(self, *_) -> None:
        if self.requested:
            return
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_descriptor)
        os.close(self._writing)
        self._timer.wait()

    def _note(self, number: int, frame: object) -> None:
        del frame
        self._signal = self._signal or signal.Signals(number)
        self._pass_on(signal.SIGTERM)


def _handler_of_jax() -> Callable[[int], object]:
    """What JAX does at SIGTERM where several processes compute together; else nothing.

    It takes note, and agrees with the others on where to stop, see
    `multihost_utils.reached_preemption_sync_point`. Its handler is one of C, which Python replaces
    and cannot call.
    """
    exchange = getattr(ctypes.CDLL(None), "signal", None)
    if exchange is None or callable(signal.getsignal(signal.SIGTERM)):  # one of Python's
        return lambda number: None
    exchange.restype, exchange.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    handler = exchange(signal.SIGTERM, None)
    exchange(signal.SIGTERM, handler)
    if handler in (None, int(signal.SIG_DFL), int(signal.SIG_IGN)):
        return lambda number: None
    return ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)


def _once(number: int) -> None:
    """Lets the present handler of a signal run once; after that the signal ends the process.

    Where the C library has no such call, the second process has to end this one by force.
    """
    set_once = getattr(ctypes.CDLL(None), "sysv_signal", None)
    if set_once is not None:
        set_once.restype, set_once.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
        set_once(number, set_once(number, None))
