"""The runs of a comparison: running what is not done, one after the other or on workers."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from fedrevive_jax import data
from fedrevive_jax.comparison import runs
from fedrevive_jax.comparison.statistics import Run
from fedrevive_jax.compute import environment
from fedrevive_jax.config import Config
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.record.interruption import Interruption
from fedrevive_jax.running import runner
from fedrevive_jax.server import client_cache
from fedrevive_jax.simulation import planning

if TYPE_CHECKING:
    from fedrevive_jax.comparison.cluster import Cluster

Notify = Callable[[str], Any]


class Workers:
    """Where the runs of a comparison are run, for as long as its context is open.

    By default in this process, one after the other, for which Dask is not imported. Otherwise on
    workers of Dask, which are started or sought when the first run needs one.

    Attributes:
      jobs: runs at once in processes of this machine.
      scheduler: address of a scheduler of Dask that others have started; "" for none.
    """

    def __init__(
        self, jobs: int = 1, scheduler: str = "", out: Path | None = None, send_back: bool = False
    ):
        """Starts nothing.

        Args:
          jobs, scheduler: see above; `jobs` says nothing where there is a scheduler.
          out: with a scheduler, a folder that its workers must see as this process does.
          send_back: they need not: they work in folders of their own and send them back.

        Raises:
          ConfigError: this is no address of a scheduler.
        """
        if scheduler and not scheduler.startswith(("tcp://", "tls://")):
            raise ConfigError("scheduler", scheduler, "must be tcp://HOST:PORT or tls://HOST:PORT")
        self.jobs, self.scheduler = jobs, scheduler
        self._out, self._send_back = out, send_back
        self._open = contextlib.ExitStack()
        self._cluster: Cluster | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_) -> None:
        self._cluster = None
        self._open.close()

    @property
    def are_elsewhere(self) -> bool:
        """Whether runs are run in other processes than this one."""
        return self.jobs > 1 or bool(self.scheduler)

    def cluster(self, interruption: Interruption | None) -> "Cluster":
        """The workers, started or sought at the first call.

        Raises:
          UserError: there are none, or not such as can run what this process would.
        """
        # Dask takes a second to import, and a comparison in this process does without.
        from fedrevive_jax.comparison import cluster

        if self._cluster is None:
            opened = (
                cluster.existing(self.scheduler, self._out, self._send_back, interruption)
                if self.scheduler
                else cluster.local(self.jobs)
            )
            self._cluster = self._open.enter_context(opened)
        return self._cluster


def run_all(
    configs: Sequence[Config],
    workers: Workers | None = None,
    overwrite: bool = False,
    notify: Notify = print,
    interruption: Interruption | None = None,
) -> list[Run]:
    """Runs what is not done, continues what was interrupted, and reads what all have recorded.

    A run that diverges or reaches its limit of rejected uploads is marked in its folder and counts
    as done.

    Args:
      configs: what to run, each with a folder of its own.
      workers: where; in this process, one after the other, by default.
      overwrite: run again what is done.
      notify: told a line for every run.
      interruption: asks the runs to save and stop.

    Raises:
      ConfigError: a folder holds another run, a memory of all clients cannot fit, the data are
        not what a run needs, or several processes would share an accelerator.
      InterruptedRunError: the runs were asked to stop, and have saved.
      UserError: see `cluster`.
    """
    environment.check()
    workers = workers or Workers()
    if workers.scheduler:
        # What their device decides is settled for it: this process may have another.
        platform = workers.cluster(interruption).platform
        configs = [runner.settle(config, platform) for config in configs]
    elif workers.jobs > 1 and jax.default_backend() != "cpu":
        raise ConfigError(
            "jobs",
            workers.jobs,
            "must be 1 on an accelerator, which one process holds; `scheduler` takes several",
        )
    # Folders and memories are checked before the first run, so that a wrong one is told at once.
    digest_of = _once_each()
    waiting = [config for config in configs if overwrite or not runs.is_done(config, digest_of)]
    if not workers.scheduler:  # whose workers have memories of their own
        _check_caches(waiting, workers.jobs)

    def done(config: Config) -> None:
        notify(runs.line(config))

    if not waiting:
        pass
    elif workers.are_elsewhere:
        workers.cluster(interruption).run(waiting, overwrite, done, interruption)
    else:
        for config in waiting:
            runs.run(config, overwrite, interruption)
            done(config)
    return [runs.read(config.run_dir) for config in configs]


def read_all(folders: Sequence[tuple[str, Path]]) -> list[Run]:
    """Runs that exist already: what each is called, empty for its method's name, and its folder."""
    return [runs.read(folder)._replace(label=label) for label, folder in folders]


def _check_caches(configs: Sequence[Config], jobs: int) -> None:
    """Whether what the methods keep of every client fits, of the largest runs that may meet, see
    `client_cache.check_fit`.

    Raises:
      ConfigError: it does not.
    """
    # Seeds, rates and folders change no size.
    same = {"seed": 0, "server_lr": 1.0, "client_lr": 1.0, "workdir": ""}
    sizes: dict[Config, int] = {}
    places: dict[tuple[str, str], list[tuple[int, Config]]] = {}
    for config in configs:
        alike = dataclasses.replace(config, **same)
        if alike not in sizes:
            sizes[alike] = planning.cache_bytes(alike)
        if sizes[alike]:
            place = (config.cache_memory, config.cache_dir)
            places.setdefault(place, []).append((sizes[alike], config))
    for found in places.values():
        found.sort(key=lambda item: -item[0])
        needed, config = found[0]
        client_cache.check_fit(config, needed)
        together = found[:jobs]
        try:
            client_cache.check_fit(config, sum(size for size, _ in together))
        except ConfigError as error:
            raise ConfigError("jobs", jobs, f"too many at once. {error}") from None


def _once_each() -> Callable[[Config], str]:
    """`data.digest`, which is the same for every seed, and so reads each data set once."""
    known: dict[tuple[str, str], str] = {}

    def digest_of(config: Config) -> str:
        place = config.dataset, config.data_dir
        if place not in known:
            known[place] = data.digest(config)
        return known[place]

    return digest_of
