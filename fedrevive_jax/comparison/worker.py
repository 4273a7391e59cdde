"""What a worker of Dask does for a comparison: it runs one run, and stops when it shall.

The scheduler imports this module too, so that what needs JAX is imported by the functions alone.
"""

import contextlib
import dataclasses
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import distributed
from distributed.core import Status

from fedrevive_jax.config import Config, is_bucket
from fedrevive_jax.errors import ConfigError, UserError

if TYPE_CHECKING:
    from fedrevive_jax.comparison.parcels import Parcel

# What must be the same everywhere, or a run would depend on where it is run.
PACKAGES = ("fedrevive-jax", "jax", "jaxlib", "flax", "numpy", "distributed")
# Seconds between two looks at whether a run shall stop.
LOOK_EVERY = 1.0
# Seconds to wait for a folder that another process holds: a worker that lost its scheduler, and
# with it its run, needs a moment to save.
PATIENCE = 30.0

_LOG = logging.getLogger(__name__)


class Facts(NamedTuple):
    """What a worker is.

    Attributes:
      versions: of `PACKAGES`; "" where one is not installed.
      platform: JAX's name of the kind of its devices.
      threads: how many tasks it would do at once.
    """

    versions: dict[str, str]
    platform: str
    threads: int


class Sign(NamedTuple):
    """A file by which a worker tells whether it sees the folder of the comparison.

    Attributes:
      path: where it is.
      text: what it holds.
    """

    path: str
    text: str


class Task(NamedTuple):
    """A run for a worker.

    Attributes:
      config: settled, with the folder of the comparison.
      expected: what the worker must be.
      sign: what it must see; None where that is not asked.
      send_back: it works in a folder of its own, and sends that back.
      kept: name of the variable of Dask that holds the run's newest folder, for workers that do not
        see it: a `Parcel`, or None where there is nothing yet.
      stop: name of the event that tells all runs to save and stop.
      topic: under which warnings are told.
    """

    config: Config
    expected: Facts
    sign: Sign | None
    send_back: bool
    kept: str
    stop: str
    topic: str


class Reply(NamedTuple):
    """What became of a run.

    Attributes:
      error: what the user has to mend; None where nothing.
      stopped: how it was interrupted, in words; "" where it came to its end.
      parcel: its folder, where it is sent back.
    """

    error: UserError | None = None
    stopped: str = ""
    parcel: "Parcel | None" = None


def versions() -> dict[str, str]:
    """Of `PACKAGES`, as they are installed here."""
    found: dict[str, str] = dict.fromkeys(PACKAGES, "")
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def facts(dask_worker: distributed.Worker) -> Facts:
    """Of the worker that this is called on."""
    import jax

    return Facts(versions(), jax.default_backend(), dask_worker.state.nthreads)


def difference(found: Facts, expected: Facts) -> str:
    """What a worker is and must not be; "" where it is as expected."""
    for name, version in expected.versions.items():
        if found.versions.get(name) != version:
            return f"has {name} {found.versions.get(name) or 'not'}, but {version} is needed"
    if found.platform != expected.platform:
        return f"computes on {found.platform}, others on {expected.platform}"
    if found.threads != expected.threads:
        return (
            f"has {found.threads} threads and would do as many runs at once; "
            "start it with --nthreads 1"
        )
    return ""


def sees(sign: Sign) -> bool:
    """Whether this process sees what the one of the comparison has written."""
    try:
        return Path(sign.path).read_text(encoding="utf-8") == sign.text
    except (OSError, ValueError):
        return False


def work(task: Task) -> Reply:
    """Runs a run, or goes on with it from its newest checkpoint; called by Dask.

    Errors that are the user's to mend, and a stop, are replies.

    Raises:
      Reschedule: this worker is about to close; the run has saved, and shall go on elsewhere.
    """
    worker = distributed.get_worker()
    watch = _Watch(worker, task.stop)
    try:
        with _heard(worker, task), contextlib.ExitStack() as stack:
            own = facts(worker)
            wrong = difference(own, task.expected)
            if not wrong and task.sign is not None and not sees(task.sign):
                wrong = f"does not see {Path(task.sign.path).parent}"
            if wrong:
                raise ConfigError("scheduler", None, f"worker {worker.address} {wrong}")
            if task.send_back:
                reply = _run_apart(task, stack.enter_context(_borrowed(task)), watch)
            else:
                _wait_for(task.config.run_dir, watch)
                reply = Reply(stopped=_run(task.config, watch))
    except UserError as error:
        return Reply(error)
    if reply.stopped and watch.worker_closes:
        raise distributed.Reschedule
    return reply


def _run(config: Config, watch: "_Watch", publish: Callable[[], None] = lambda: None) -> str:
    """Runs a run; returns how it was interrupted, "" if it was not."""
    from fedrevive_jax.comparison import runs
    from fedrevive_jax.record.interruption import InterruptedRunError

    try:
        runs.run(config, False, watch, publish)
    except InterruptedRunError as error:
        return str(error)
    return ""


def _run_apart(task: Task, config: Config, watch: "_Watch") -> Reply:
    """Runs a run in a folder of this worker, and packs that: with every checkpoint for the worker
    that would go on if this one were lost, and at the end."""
    from fedrevive_jax.comparison import parcels

    folder, told = config.run_dir, False
    # The thread that writes checkpoints is none of Dask's, which knows a client by itself.
    kept = distributed.Variable(task.kept, client=distributed.get_client())

    def keep() -> None:
        nonlocal told
        try:
            size = parcels.size(folder)
            if size <= parcels.MOST:
                kept.set(parcels.pack(folder))
            elif not told:
                told = True
                _LOG.warning(
                    "its folder of %.0f MB is sent back at the end only: if its worker is lost, it "
                    "starts again",
                    size / 1e6,
                )
        except OSError:  # a file was being replaced, or the scheduler has gone and the run stops
            pass

    stopped = _run(config, watch, keep)
    if watch.abandoned:
        kept.delete()
    return Reply(stopped=stopped, parcel=parcels.pack(folder))


@contextlib.contextmanager
def _borrowed(task: Task) -> Iterator[Config]:
    """The configuration with a folder of this worker, which is gone afterwards; errors name the
    comparison's."""
    from fedrevive_jax.comparison import parcels
    from fedrevive_jax.compute import buckets

    place = task.config.run_dir
    with tempfile.TemporaryDirectory(prefix="fedrevive-") as home:
        folder = Path(home) / place.name
        with buckets.named(folder, place):
            try:
                held: Any = distributed.Variable(task.kept).get(timeout=PATIENCE)
            except TimeoutError:
                raise UserError(f"{place}: nobody asks for it any more") from None
            if held is not None:
                parcels.unpack(parcels.Parcel(*held), folder)
            yield dataclasses.replace(task.config, workdir=str(folder))


def _wait_for(folder: Path, watch: "_Watch") -> None:
    """Waits a while for a process that holds a folder still; a bucket has no locks."""
    from fedrevive_jax.record import lock

    if is_bucket(folder):
        return
    end = time.monotonic() + PATIENCE
    while lock.is_held(folder) and time.monotonic() < end and not watch.requested:
        time.sleep(LOOK_EVERY / 10)


class _Watch:
    """Tells a run to save and stop: the comparison is interrupted, or gone without a word, or the
    worker is about to close, as at the end of its time on a cluster.

    Attributes:
      worker_closes: that the last was the reason.
    """

    def __init__(self, worker: distributed.Worker, stop: str):
        self._worker, self._key = worker, worker.get_current_task()
        self._stop = distributed.Event(stop, client=distributed.get_client())
        self._asked, self._next_look = False, 0.0
        self.worker_closes = False

    @property
    def requested(self) -> bool:
        """Whether the run shall save and stop; asks others once in `LOOK_EVERY` seconds."""
        if not self._asked and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK_EVERY
            self._asked = self._look()
        return self._asked

    @property
    def abandoned(self) -> bool:
        """Whether the comparison is gone, by now."""
        task = self._worker.state.tasks.get(self._key)
        return task is None or task.state == "cancelled"

    def share(self) -> None:
        """Takes note of a stop that another process of the run was told; a worker has no others."""
        self._asked = True

    def _look(self) -> bool:
        if self._worker.status not in (Status.running, Status.paused):
            self.worker_closes = True
            return True
        if self.abandoned:
            return True
        try:
            return bool(self._stop.is_set())
        except OSError:  # the scheduler has gone, and with it whoever would take the result
            return True


@contextlib.contextmanager
def _heard(worker: distributed.Worker, task: Task) -> Iterator[None]:
    """Sends warnings to the comparison, with the name of the run.

    Progress bars of several processes would overwrite each other, so that nothing else is told.
    """
    told = _Teller(worker, task.topic, task.config.run_dir.name)
    logger = logging.getLogger("fedrevive_jax")
    logger.addHandler(told)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            yield
    finally:
        logger.removeHandler(told)


class _Teller(logging.Handler):
    """Sends each record to whoever listens to a topic."""

    def __init__(self, worker: distributed.Worker, topic: str, name: str):
        super().__init__(logging.WARNING)
        self._worker, self._topic, self._name = worker, topic, name

    def emit(self, record: logging.LogRecord) -> None:
        self._worker.log_event(self._topic, f"{self._name}: {record.getMessage()}")
