"""One live run: the server with what it holds, the coordinator, and where it stands.

It is recorded as a simulation is, see `running.runnable.Runnable`: what is a planned moment there
is a second on the wall here. Seconds in which no server ran do not count.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedrevive_jax import data
from fedrevive_jax.clients import feed as feeds
from fedrevive_jax.clients.evaluation import Evaluation, make_evaluator
from fedrevive_jax.compute import devices, environment, trees
from fedrevive_jax.config import Config
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.live import settings
from fedrevive_jax.live.coordinator import PATIENT, Arrived, Coordinator, Times, drawn, prepared
from fedrevive_jax.live.link import Link
from fedrevive_jax.live.registry import Registry
from fedrevive_jax.models import Model, judging
from fedrevive_jax.models.model import Params
from fedrevive_jax.record.derived import Derived
from fedrevive_jax.server import builder
from fedrevive_jax.server.core import Receipt

NOTHING = Derived()
# How long one call of `advance` waits for an upload, and how often it looks.
WAIT, LOOK = 1.0, 0.02


class Federation:
    """A live run in memory.

    Attributes:
      config, dataset, model, origin, server: see `simulation.Simulation`.
      mesh: None; the server computes on one device.
      position: arrivals processed so far.
      registry: who has joined.
      step_seconds: empty; server steps are not timed, since that would hold up arrivals.
      jobs_restarted: jobs that were given up because the server was started again.
    """

    def __init__(
        self,
        config: Config,
        dataset: data.Dataset | None = None,
        model: Model | None = None,
        derived: Derived = NOTHING,
        *,
        link: Link,
        choose: Callable[[int, Sequence[int]], int] | None = None,
        times: Times = PATIENT,
        believes_names: bool = False,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] = time.sleep,
        on_arrival: Callable[[Arrived], None] = lambda arrived: None,
    ):
        """Builds everything but the clients.

        Args:
          config: what to run. What it says of a simulated world, beside N, K, the slots and the
            seed, is not read; `max_time` is in seconds.
          dataset, model, derived: see `simulation.Simulation`; the data set is the server's own, to
            evaluate on.
          link: where the clients are.
          choose: see `Coordinator`; None is a uniform draw.
          times, believes_names: see `Coordinator`.
          clock: seconds, never going back.
          wait: lets so many seconds pass.
          on_arrival: told of every upload that is taken in.

        Raises:
          ConfigError: the configuration wants what a live server does not have.
        """
        environment.check()
        if config.traits.distils and config.proxy == "histogram":
            raise ConfigError(
                "proxy",
                config.proxy,
                "is for simulations: clients tell nobody what classes they hold; must be estimated "
                "or change",
            )
        self.config, self.mesh = config, None
        self.dataset = dataset if dataset is not None else data.load(config, derived.tokenizer)
        self.model = judging.fitting(config, self.dataset, model)
        self.dataset.positions(config.eval_split)  # refused where it is empty
        start = builder.start(config, self.model, self.dataset, None, derived.origin)
        self.origin = start.origin
        feed = feeds.make_feed(self.dataset, start.frozen)
        self._store, self._labels = devices.replicate(None, (feed.store, self.dataset.labels))
        holdings = builder.holdings(
            config, self.model, self.dataset, feed.augment, feed.augment_real, start.frozen
        )
        self.server = builder.create(config, start.params, holdings)
        if self.server.client_part.term is not None:
            raise ConfigError(
                "method",
                config.method,
                "changes what clients train, which only a simulation does; must be another",
            )
        self._evaluate = make_evaluator(self.model, feed.evaluation, config.eval_batch)

        self.position, self.step_seconds, self.jobs_restarted = 0, [], 0
        self._warm = False
        self._staleness: Counter[int] = Counter()
        self._link, self._clock, self._wait = link, clock, wait
        self._on_arrival = on_arrival
        self._before, self._began = 0.0, clock()
        self._arrived_at = self._version_at = self._version_before = 0.0
        self._took = 0.0
        self.registry = Registry(config.num_clients)
        told = settings.of_server(config, self.dataset, self.origin).to_json()
        tokenizer = self.dataset.tokenizer
        text = tokenizer.serialised if tokenizer else ""
        digest = hashlib.sha256(json.dumps([told, text]).encode()).hexdigest()
        self._coordinator = Coordinator(
            self.server,
            link,
            self.registry,
            self.server.upload_like(),
            prepared(told, digest, text),
            concurrency=config.concurrency,
            open_slots=config.open_slots,
            choose=choose or drawn(config.seed),
            times=times,
            believes_names=believes_names,
        )

    @property
    def derived(self) -> Derived:
        """What was derived from the data, to be kept with the run."""
        tokenizer = self.dataset.tokenizer
        return Derived(tokenizer.serialised if tokenizer else "", None, self.origin)

    @property
    def fingerprint(self) -> str:
        """A digest of the data that the server evaluates on."""
        return self.dataset.digest

    @property
    def restarts_in_words(self) -> str:
        return "the jobs under way are given up"

    @property
    def settled(self) -> dict[str, Any]:
        return {}

    @property
    def planned_arrivals(self) -> None:
        return None

    @property
    def finished(self) -> bool:
        limit = self.config
        return self.server.version >= limit.max_versions or self._seconds() >= limit.max_time

    @property
    def now(self) -> float:
        """Seconds until the last arrival."""
        return self._arrived_at

    @property
    def started(self) -> float:
        """Seconds until the job of the last arrival was handed out."""
        return self._arrived_at - self._took

    @property
    def staleness(self) -> np.ndarray:
        """Of the arrivals so far, int [position], ascending."""
        values = sorted(self._staleness.items())
        return np.repeat(*np.asarray(values, np.int64).reshape(-1, 2).T)

    @property
    def is_settled(self) -> bool:
        """There is time to look at what came before between two arrivals."""
        return True

    @property
    def bytes_sent(self) -> int:
        """See `Simulation.bytes_sent`; of the models alone, without what the network adds."""
        up = trees.nbytes(self.server.upload_like())
        return self.server.next_job * trees.nbytes(self.server.params) + self.position * up

    @property
    def facts(self) -> dict[str, Any]:
        """What the summary says of a live run."""
        return {
            "live": True,
            "clients_joined": len(self.registry.seats),
            "replies_ignored": self._coordinator.ignored,
            "simulated_time": self._arrived_at,
        }

    @property
    def slots(self) -> tuple[int, int, int]:
        """See `Coordinator.slots`."""
        return self._coordinator.slots

    def advance(self) -> Receipt | None:
        """The next arrival; None where none has come for a second."""
        if not self._warm:
            self.server.compile()  # once, so that no client waits for it
            self._warm = True
        until = self._clock() + WAIT
        while not self.finished:
            arrived = self._coordinator.advance(self._clock())
            if arrived is not None:
                return self._note(arrived)
            if self._clock() >= until:
                break
            self._wait(LOOK)
        return None

    def _note(self, arrived: Arrived) -> Receipt:
        receipt = arrived.receipt
        self.position += 1
        self._staleness[receipt.staleness] += 1
        self._arrived_at, self._took = self._seconds(), arrived.round_trip
        if receipt.new_version > receipt.version:
            self._version_before, self._version_at = self._version_at, self._arrived_at
        self._on_arrival(arrived)
        return receipt

    def close(self) -> None:
        """Gives up what is under way."""
        self._coordinator.give_up()

    def is_first_after(self, interval: float, version: int) -> bool:
        """Whether the newest version is the first since a multiple of an interval of seconds."""
        del version
        return self._version_at // interval > self._version_before // interval

    def evaluate(self) -> Evaluation:
        """Evaluates the newest version on the configured split of the server's own data."""
        positions = self.dataset.positions(self.config.eval_split)
        return self._evaluate(self.server.params, self._store, self._labels, positions)

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Everything a continuation needs: (plain record, pytree of arrays).

        Jobs under way are no part of it: their messages belong to this process, and no other can
        hear the replies.
        """
        record, arrays = self.server.snapshot(exact=False)
        return {
            **record,
            "position": self.position,
            "fingerprint": self.fingerprint,
            "clients": self.registry.snapshot(),
            "seconds": self._seconds(),
            "arrived_at": self._arrived_at,
            "version_at": self._version_at,
            "staleness": sorted(self._staleness.items()),
            "cohort": self.slots[1],
            "jobs_restarted": self.jobs_restarted,
        }, {**arrays, "uploads": {}}

    def check(self, record: dict[str, Any]) -> None:
        """Whether a snapshot is one of a live run on these data.

        Raises:
          ConfigError: it is not.
        """
        if "clients" not in record or record.get("fingerprint") != self.fingerprint:
            raise ConfigError(
                "workdir",
                self.config.run_dir,
                "the checkpoint is of a simulation, or of a run on other data; use overwrite=True "
                "to start afresh",
            )

    def shapes(self, record: dict[str, Any]) -> dict[str, Any]:
        """The structure and shapes of a snapshot's arrays, told from its record."""
        return {**self.server.shapes(record), "uploads": {}}

    def restore(self, record: dict[str, Any], params: Params, arrays: dict[str, Any]) -> None:
        """Continues from a snapshot; the jobs that were under way are given up."""
        self.server.restore(record, params, arrays)
        jobs = [job for job, *_ in record["jobs"]]
        for job in jobs:
            self.server.give_up(job)
        self.registry.restore(record["clients"])
        self._coordinator.restore(record["cohort"])
        self.position = record["position"]
        self._staleness = Counter({value: count for value, count in record["staleness"]})
        self.jobs_restarted = record["jobs_restarted"] + len(jobs)
        self._before, self._began = record["seconds"], self._clock()
        self._arrived_at = record["arrived_at"]
        self._version_at = self._version_before = record["version_at"]

    def _seconds(self) -> float:
        return self._before + self._clock() - self._began
