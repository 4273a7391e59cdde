"""Workers of Dask that run the runs of a comparison: processes of this machine, or any others.

Dask carries runs to workers and back, starts processes, and gives what a lost worker had to another
one. A run is saved in its folder, so that it goes on there from its newest checkpoint.
"""

import collections
import contextlib
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import dask.config
import distributed
from distributed.scheduler import KilledWorker

from fedrevive_jax.comparison import parcels, worker
from fedrevive_jax.config import Config, is_bucket
from fedrevive_jax.errors import ConfigError, UserError, one_line
from fedrevive_jax.record import files
from fedrevive_jax.record.interruption import InterruptedRunError, Interruption
from fedrevive_jax.running import runner

# A file in the folder of a comparison, by which workers tell whether they see it.
SIGN = ".seen_by_workers"
# Seconds between two looks at what has come in, and at whether all shall stop.
LOOK_EVERY = 0.2
# Seconds in which a scheduler must answer.
ANSWER = 10
# Seconds that runs have to save after an error of another one, where no grace is given.
GRACE = 30.0
# The part of the grace in which runs that are sent back may save; the rest is for taking what their
# workers have sent before.
SAVING = 0.6
# What Dask does otherwise, and processes of this machine need not.
_LOCAL = {
    # A worker that does not answer for long computes; that it has died is seen without this.
    "distributed.scheduler.worker-ttl": None,
    # NumPy's threads are those of a run in this process.
    "distributed.nanny.pre-spawn-environ": {},
    # Pages about the state of the cluster, on ports of their own.
    "distributed.scheduler.http.routes": [],
    "distributed.worker.http.routes": [],
}

# A `distributed.Client`, whose calls are typed as those of an asynchronous one.
_Client = Any

_LOG = logging.getLogger(__name__)


class LostWorkerError(UserError):
    """The processes that ran a part of the comparison are gone."""


class LostSchedulerError(LostWorkerError):
    """The scheduler is gone, and with it whatever it held."""

    def __init__(self):
        super().__init__("the scheduler is gone; the same command continues")


class _InBackground(distributed.WorkerPlugin):
    """Leaves the terminal to the process of the comparison: Ctrl-C, which goes to all, is told to
    workers by it, and what Dask and libraries say in them is not for the user."""

    name = "fedrevive_jax-in-background"

    def setup(self, worker: distributed.Worker) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stderr.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def local(jobs: int) -> Iterator["Cluster"]:
    """Processes of this machine, one run at a time in each.

    They and the scheduler listen on loopback, and speak TLS with a key that no other process has:
    whoever could speak to them could run code as this user.

    Args:
      jobs: how many.
    """
    import jax

    expected = worker.Facts(worker.versions(), jax.default_backend(), threads=1)
    with (
        _quiet(),
        dask.config.set(_LOCAL),
        distributed.LocalCluster(
            n_workers=jobs,
            threads_per_worker=1,
            host="127.0.0.1",
            security=True,
            memory_limit=None,
            # Its port shows nothing, see `_LOCAL`; any that is free.
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
        ) as processes,
        distributed.Client(processes) as client,
    ):
        client.register_plugin(_InBackground())
        yield Cluster(client, expected, sign=None, send_back=False)


@contextlib.contextmanager
def existing(
    address: str, out: Path | None, send_back: bool, interruption: Interruption | None
) -> Iterator["Cluster"]:
    """The workers of a scheduler that others have started.

    Args:
      address: of the scheduler, as Dask writes it: tcp://HOST:PORT or tls://HOST:PORT.
      out: a folder that workers must see, unless they send back; that they see a bucket, their
        first run shows.
      send_back: workers need not see any folder.
      interruption: ends the wait for a first worker.

    Raises:
      ConfigError: there is no scheduler, or it or a worker is not as it must be.
      InterruptedRunError: interrupted before there was a worker.
    """
    with _quiet(), contextlib.ExitStack() as stack:
        client = stack.enter_context(_connected(address))
        _check_scheduler(client, address)
        _await_worker(client, address, interruption)
        with _gone(address):
            found = client.run(worker.facts)
        expected = worker.Facts(worker.versions(), next(iter(found.values())).platform, threads=1)
        for name, facts in found.items():
            wrong = worker.difference(facts, expected)
            if wrong:
                raise ConfigError("scheduler", address, f"worker {name} {wrong}")
        sign = None
        if out is not None and not send_back and not is_bucket(out):
            sign = stack.enter_context(_signed(out))
            with _gone(address):
                seen = client.run(worker.sees, sign)
            for name in (name for name, sees in seen.items() if not sees):
                raise ConfigError(
                    "scheduler",
                    address,
                    f"worker {name} does not see out={out}; give a folder that all see, by the "
                    "same path, or `send_back`",
                )
        yield Cluster(client, expected, sign, send_back)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Dask's own messages are kept from the terminal; what matters is told in the words here."""
    logger = logging.getLogger("distributed")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _connected(address: str) -> _Client:
    """A client of the scheduler.

    Raises:
      ConfigError: no scheduler answers there.
    """
    try:
        return distributed.Client(address, timeout=ANSWER)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError("scheduler", address, f"cannot be reached ({told})") from None


@contextlib.contextmanager
def _gone(address: str) -> Iterator[None]:
    """Where contact is lost, that becomes one line.

    Raises:
      ConfigError, LostWorkerError: instead.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError("scheduler", address, f"a worker lacks {error.name}") from None
    except OSError as error:
        raise LostWorkerError(
            f"scheduler={address}: lost contact ({error}); the same command continues"
        ) from None


def _check_scheduler(client: _Client, address: str) -> None:
    """Whether the scheduler, which unpacks what it hands on, has what this process has."""
    with _gone(address):
        told = client.get_versions(packages=list(worker.PACKAGES))
    found = told["scheduler"]["packages"]
    for name, version in worker.versions().items():
        if found[name] != version:
            raise ConfigError(
                "scheduler",
                address,
                f"the scheduler has {name} {found[name] or 'not'}, but {version} is needed",
            )


def _await_worker(client: _Client, address: str, interruption: Interruption | None) -> None:
    """Waits until there is a worker: a queue of a cluster may take long."""
    told = False
    while True:
        with _gone(address), contextlib.suppress(TimeoutError):
            client.wait_for_workers(1, timeout=LOOK_EVERY)
            return
        if interruption is not None and interruption.requested:
            raise InterruptedRunError("interrupted: no run was begun, there was no worker yet")
        if not told:
            _LOG.warning("scheduler=%s has no worker yet; waiting for one", address)
            told = True


@contextlib.contextmanager
def _signed(out: Path) -> Iterator[worker.Sign]:
    """A file in a folder, as long as the context."""
    sign = worker.Sign(str(out.absolute() / SIGN), secrets.token_hex(16))
    Path(sign.path).write_text(sign.text, encoding="utf-8")
    try:
        yield sign
    finally:
        Path(sign.path).unlink(missing_ok=True)


class Cluster:
    """Workers, and how they are told to run and to stop."""

    def __init__(
        self,
        client: _Client,
        expected: worker.Facts,
        sign: worker.Sign | None,
        send_back: bool,
    ):
        """Args:
        client: to the scheduler.
        expected: what every worker must be.
        sign: what every worker must see, see `worker.Task`.
        send_back: workers run in folders of their own.
        """
        self._client, self._expected = client, expected
        self._sign, self._send_back = sign, send_back

    @property
    def platform(self) -> str:
        """JAX's name of the kind of device that the workers compute on."""
        return self._expected.platform

    def run(
        self,
        configs: Sequence[Config],
        overwrite: bool,
        done: Callable[[Config], None],
        interruption: Interruption | None,
    ) -> None:
        """Runs configurations to their ends, as many at once as there are workers.

        Args:
          configs: what to run.
          overwrite: start each of them afresh.
          done: told each run that has come to its end.
          interruption: asks the runs under way to save and stop.

        Raises:
          UserError: of a run; those under way have saved.
          LostWorkerError: a run has lost one worker after the other, or the scheduler is gone.
          InterruptedRunError: interrupted; likewise.
        """
        waiting = collections.deque(configs)
        under_way: dict[distributed.Future, Config] = {}
        held: Mapping[str, Sequence[str]] = {}
        name, keys = secrets.token_hex(8), []
        stop = distributed.Event(f"fedrevive_jax-stop-{name}", client=self._client)
        topic = f"fedrevive_jax-{name}"
        self._client.subscribe_topic(topic, _warn)
        try:
            while waiting or under_way:
                if interruption is not None and interruption.requested:
                    raise InterruptedRunError(
                        f"interrupted: {len(configs) - len(waiting) - len(under_way)} of "
                        f"{len(configs)} runs are done, those under way have saved"
                    )
                before, held = held, self._processing()
                _tell_lost(before, held, {str(f.key): c for f, c in under_way.items()})
                # No more than there are workers: a run that waits behind another one at a worker
                # would count as lost with it.
                while waiting and len(under_way) < max(1, len(held)):
                    config = waiting.popleft()
                    if overwrite:
                        runner.empty(config)
                    key = f"{config.run_dir.name}-{name}"
                    keys.append(key)
                    task = self._task(config, key, stop.name, topic)
                    future = self._client.submit(worker.work, task, key=key, pure=False)
                    under_way[future] = config
                for future in _ended(under_way):
                    config = under_way.pop(future)
                    stopped = self._take(future, config)
                    if stopped:
                        raise InterruptedRunError(f"{stopped}, at a worker that was told to stop")
                    done(config)
        except LostSchedulerError:
            raise
        except BaseException:
            self._stop(stop, under_way, GRACE if interruption is None else interruption.grace)
            raise
        finally:
            with contextlib.suppress(ValueError, OSError, RuntimeError):
                for key in keys if self._send_back else ():
                    self._kept(key).delete()
                self._client.unsubscribe_topic(topic)

    def _processing(self) -> Mapping[str, Sequence[str]]:
        """What each worker has to do, by its address.

        Raises:
          LostSchedulerError: the scheduler is gone.
        """
        try:
            return self._client.processing()
        except OSError:
            raise LostSchedulerError() from None

    def _task(self, config: Config, key: str, stop: str, topic: str) -> worker.Task:
        """What a worker is told; a run that it sends back goes on from what is here."""
        if self._send_back:
            parcels.mend(config.run_dir)
            begun = (config.run_dir / files.CONFIG).exists()
            self._kept(key).set(parcels.pack(config.run_dir) if begun else None)
        return worker.Task(config, self._expected, self._sign, self._send_back, key, stop, topic)

    def _kept(self, key: str) -> distributed.Variable:
        """What the scheduler has of the folder of a run that is sent back."""
        return distributed.Variable(key, client=self._client)

    def _take(self, future: distributed.Future, config: Config) -> str:
        """Takes what a run's worker has replied; returns how the run was stopped, "" if it was not.

        Raises:
          UserError: of the run, or its workers are lost.
        """
        try:
            reply: worker.Reply = future.result()
        except KilledWorker as error:
            _attempt(self._take_kept, future, config)
            name = config.run_dir.name
            raise LostWorkerError(
                f"{name}: {error.allowed_failures + 1} workers have died of it, killed or out of "
                "memory; the same command continues"
            ) from None
        except distributed.CancelledError:
            raise LostSchedulerError() from None
        if reply.error is not None:
            _attempt(self._take_kept, future, config)
            raise reply.error
        if reply.parcel is not None:
            parcels.deliver(reply.parcel, config)
            # The scheduler's memory is for those under way.
            self._kept(str(future.key)).delete()
        return reply.stopped

    def _take_kept(self, future: distributed.Future, config: Config) -> None:
        """Takes the newest folder of a run whose worker sends it no more."""
        if self._send_back:
            held: Any = self._kept(str(future.key)).get(timeout=ANSWER)
            if held is not None:
                parcels.deliver(parcels.Parcel(*held), config)

    def _stop(
        self, stop: distributed.Event, under_way: dict[distributed.Future, Config], grace: float
    ) -> None:
        """Has the runs under way save, and takes what they send back, each as it comes: the process
        may be ended when the grace is over. Of those that save for too long it takes what they have
        sent before."""
        rest = dict(under_way)
        end = time.monotonic() + grace * (SAVING if self._send_back else 1.0)
        try:
            if rest:
                stop.set()
            while rest and time.monotonic() < end:
                for future in _ended(rest):
                    _attempt(self._take, future, rest.pop(future))
        except (LostSchedulerError, OSError, RuntimeError):
            return  # and nothing can be taken
        for future, config in rest.items():
            _attempt(self._take_kept, future, config)


def _attempt(
    take: Callable[[distributed.Future, Config], object],
    future: distributed.Future,
    config: Config,
) -> None:
    """Takes something of a run that is ended because of another one, whose error counts."""
    try:
        take(future, config)
    except Exception as error:  # of a worker, of the scheduler, of a disk
        _LOG.warning("%s: %s", config.run_dir.name, one_line(error))


def _ended(under_way: Mapping[distributed.Future, Config]) -> list[distributed.Future]:
    """Those that have ended, after a moment's wait for one.

    Raises:
      LostWorkerError: the scheduler is gone.
    """
    try:
        distributed.wait(list(under_way), timeout=LOOK_EVERY, return_when="FIRST_COMPLETED")
    except TimeoutError:
        return []
    except distributed.CancelledError:
        raise LostSchedulerError() from None
    return [future for future in under_way if future.done()]


def _tell_lost(
    before: Mapping[str, Sequence[str]],
    now: Mapping[str, Sequence[str]],
    under_way: Mapping[str, Config],
) -> None:
    """Tells of runs whose worker was there at the last look and has gone."""
    for address in before.keys() - now.keys():
        for key in before[address]:
            if key in under_way:
                name = under_way[key].run_dir.name
                _LOG.warning("%s: its worker %s is lost; another one goes on", name, address)


def _warn(event: tuple[float, str]) -> None:
    """Tells a warning of a run, which comes with the run's name."""
    _LOG.warning("%s", event[1])
