"""The virtual clock: who starts when, from which version, and who arrives when with what staleness.

Durations never depend on the values of a model, so the whole schedule of a run is computed before
any training (arXiv 2511.00655, section 4; the staleness contract below is ours).

The contract:

* A job is download -> local training -> upload. K jobs are always in flight once slots are filled.
* A client is free again when its local *training* ends; its upload may still be under way.
* An arrival is processed when its upload ends. Ties in time are ordered by (time, job number), and
  jobs are numbered in the order in which they were handed out. Trainings that end at the same time
  as an arrival end before it.
* Staleness tau = global version at the arrival, before any version that this arrival makes, minus
  the version the job started from.
* Every B-th arrival makes a new version.
* An arrival opens one slot. As soon as `open_slots` slots are open, that many free clients are
  drawn uniformly without replacement and start from the newest version, the one that this arrival
  made included.

Failures, where the configuration asks for them, are drawn by (seed, job) and planned with the rest:

* `lost`: the upload never comes. It takes no place in the buffer. Its client is free when its
  training ends, as always; when the upload would have been due, one free client starts in its
  stead, also in a synchronous cohort.
* `late`: the upload comes when `LATE` times the job's duration has passed. The client is free when
  its training ends, as always.
* `nan`: the upload comes in time and is not finite, so that the server rejects it.
"""

import dataclasses
import enum
import functools
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedrevive_jax.clock import delays
from fedrevive_jax.compute.streams import Stream, numpy_generator
from fedrevive_jax.config import Config
from fedrevive_jax.errors import ConfigError

LATE = 5.0
# A plan of more jobs is refused: it takes seconds and gigabytes before anything is trained.
MOST_JOBS = 3_000_000


class Fault(enum.IntEnum):
    """What goes wrong with a job; names in lower case are those of `fault_kinds`."""

    NONE = 0
    LOST = 1
    LATE = 2
    NAN = 3


@dataclass(frozen=True)
class Schedule:
    """All jobs of a run and the order in which they arrive.

    Attributes:
      client, visit, base_version: int arrays [jobs], in the order in which jobs were handed out:
        who works, how often it has worked before, starting from which global version.
      start, train_end, arrival_time: float64 arrays [jobs], simulated time.
      fault: int8 array [jobs], what goes wrong, see `Fault`.
      arrival_of_job: int array [jobs], index of the job's arrival, -1 for lost ones and for the
        jobs still in flight when the run stops.
      job: int array [arrivals], the job that arrives.
      staleness: int array [arrivals], tau.
      version: int array [arrivals], the newest version once the arrival is processed.
      jobs_started: int array [arrivals], number of jobs handed out before the next one.
      initial_jobs: number of jobs handed out before the first arrival.
      lost: uploads that were due by the end and never came.
    """

    client: np.ndarray
    visit: np.ndarray
    base_version: np.ndarray
    start: np.ndarray
    train_end: np.ndarray
    arrival_time: np.ndarray
    fault: np.ndarray
    arrival_of_job: np.ndarray
    job: np.ndarray
    staleness: np.ndarray
    version: np.ndarray
    jobs_started: np.ndarray
    initial_jobs: int
    lost: int = 0

    @property
    def nbytes(self) -> int:
        """Size of all its arrays."""
        arrays = (getattr(self, field.name) for field in dataclasses.fields(self))
        return sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))

    @property
    def num_arrivals(self) -> int:
        return len(self.job)

    @property
    def num_versions(self) -> int:
        """Versions made during the run, not counting the initial version 0."""
        return int(self.version[-1]) if len(self.version) else 0

    @functools.cached_property
    def time(self) -> np.ndarray:
        """Simulated time of every arrival, float64 [arrivals]."""
        return self.arrival_time[self.job]

    def made_at(self, version: int) -> float:
        """Simulated time at which a version is made."""
        return float(self.time[np.searchsorted(self.version, version)]) if version else 0.0

    def is_first_after(self, interval: float, version: int) -> bool:
        """Whether a version is the first since a multiple of an interval of simulated time."""
        before, now = (self.made_at(v) // interval for v in (version - 1, version))
        return now > before

    @property
    def faults(self) -> dict[str, int]:
        """Failures until the end of the run by kind, the kinds of `fault_kinds`."""
        arrived = self.fault[self.job]
        late, nan = (int((arrived == kind).sum()) for kind in (Fault.LATE, Fault.NAN))
        return {"lost": self.lost, "late": late, "nan": nan}

    def live_versions_max(self) -> int:
        """The most versions whose parameters must be kept at one moment.

        Version v is live from its creation until the last job that started from it has arrived,
        and at least until v+1 has replaced it as the newest. While an arrival is processed, the
        version it makes, the one that this replaces and the one its job started from are all live.
        A job that will be lost keeps none.
        """
        versions = self.num_versions + 1
        end = self.num_arrivals
        created = np.concatenate([[-1], np.searchsorted(self.version, np.arange(1, versions))])
        last = np.append(created[1:], end)
        arrivals = np.where(self.arrival_of_job < 0, end, self.arrival_of_job)
        kept = self.fault != Fault.LOST
        np.maximum.at(last, self.base_version[kept], arrivals[kept])
        change = np.zeros(end + 3, np.int64)
        np.add.at(change, created + 1, 1)
        np.add.at(change, last + 2, -1)
        return int(np.cumsum(change).max())


class _UniformBlocks:
    """Uniform numbers by position, drawn a block at a time: u[i] depends on (seed, i) alone."""

    SIZE = 1 << 14

    def __init__(self, seed: int, stream: Stream):
        self._seed = seed
        self._stream = stream
        self._block = -1
        self._values: list[float] = []

    def __getitem__(self, position: int) -> float:
        block, offset = divmod(position, self.SIZE)
        if block != self._block:
            generator = numpy_generator(self._seed, self._stream, block)
            self._values = generator.random(self.SIZE).tolist()
            self._block = block
        return self._values[offset]


def create(config: Config) -> Schedule:
    """The plan of a configuration; needs neither data nor JAX.

    Raises:
      ConfigError: no version would be made, or the plan is too large.
    """
    plan = simulate(
        delays.create(config),
        num_clients=config.num_clients,
        concurrency=config.concurrency,
        buffer_size=config.buffer_size,
        open_slots=config.open_slots,
        max_time=config.max_time,
        max_versions=config.max_versions,
        seed=config.seed,
        fault_rate=config.fault_rate,
        fault_kinds=[Fault[kind.upper()] for kind in config.fault_kinds.split(",")],
    )
    if not plan.num_versions:
        raise ConfigError("max_time", f"{config.max_time:g}", _why_useless(config, plan))
    return plan


def _why_useless(config: Config, plan: Schedule) -> str:
    """Why a plan makes no version: what arrives, and how long its jobs take."""
    times = plan.arrival_time - plan.start
    of = (
        f"delay_trace={config.delay_trace}"
        if config.delays == "trace"
        else f"delays={config.delays}"
    )
    took = f"{times.min():.4g} to {times.max():.4g}, {times.mean():.4g} on average"
    lost = f", {plan.lost} are lost (fault_rate={config.fault_rate:g})" if plan.lost else ""
    return (
        f"must be long enough for a version, which needs buffer_size={config.buffer_size} uploads; "
        f"{plan.num_arrivals} arrive{lost}; by {of} a job takes {took}"
    )


def simulate(
    durations: delays.DelayModel,
    *,
    num_clients: int,
    concurrency: int,
    buffer_size: int,
    open_slots: int,
    max_time: float,
    max_versions: int,
    seed: int,
    fault_rate: float = 0.0,
    fault_kinds: Sequence[Fault] = (),
) -> Schedule:
    """Runs the virtual clock until `max_time` or until `max_versions` versions are made.

    Args:
      durations: how long jobs take.
      num_clients: N.
      concurrency: K, at most N.
      buffer_size: B.
      open_slots: open slots at which new jobs are handed out; 1 is asynchronous, K synchronous.
      max_time: arrivals after this simulated time are not processed.
      max_versions: the arrival that makes this version is the last one.
      seed: seed of the choice of clients and of failures.
      fault_rate: probability that a job fails.
      fault_kinds: how, each kind as likely.

    Returns:
      The schedule; all its draws are addressed by (seed, what, who), see `streams`.

    Raises:
      ConfigError: it would hold more than `MOST_JOBS` jobs.
    """
    if not 1 <= open_slots <= concurrency <= num_clients or buffer_size < 1:
        raise ValueError("need 1 <= open_slots <= concurrency <= num_clients and buffer_size >= 1")
    # Plain Python lists and floats: element access in NumPy arrays would dominate the loop.
    train_offsets: list[list[float]] = []  # by visit: download + train of every client
    upload_times: list[list[float]] = []
    choice = _UniformBlocks(seed, Stream.CLIENT_CHOICE)
    failure = _UniformBlocks(seed, Stream.FAULT)
    free = list(range(num_clients))
    visits = [0] * num_clients
    training: list[tuple[float, int]] = []  # (end of training, job)
    uploading: list[tuple[float, int]] = []  # (arrival, job)
    client, visit, base_version, start, train_end, arrival_time = [], [], [], [], [], []
    fault, job, staleness, version, jobs_started = [], [], [], [], []
    newest = buffered = open_now = lost = 0

    def fault_of(number: int) -> Fault:
        # Whether a job fails and how, from one uniform number.
        share = failure[number] / fault_rate if fault_rate else 1.0
        return fault_kinds[int(share * len(fault_kinds))] if share < 1 else Fault.NONE

    def hand_out(count: int, now: float) -> None:
        for _ in range(count):
            number = len(client)
            if number == MOST_JOBS:
                raise ConfigError(
                    "max_time",
                    max_time,
                    f"plans more than {MOST_JOBS} jobs; must be smaller, or "
                    f"max_versions={max_versions} must be",
                )
            place = int(choice[number] * len(free))
            who = free[place]
            last = free.pop()
            if place < len(free):
                free[place] = last
            turn = visits[who]
            visits[who] = turn + 1
            if turn == len(train_offsets):
                drawn = durations.durations(turn)
                train_offsets.append((drawn.download + drawn.train).tolist())
                upload_times.append(drawn.upload.tolist())
            trained = now + train_offsets[turn][who]
            arrives = trained + upload_times[turn][who]
            wrong = fault_of(number)
            if wrong is Fault.LATE:
                arrives = now + LATE * (arrives - now)
            fault.append(wrong)
            client.append(who)
            visit.append(turn)
            base_version.append(newest)
            start.append(now)
            train_end.append(trained)
            arrival_time.append(arrives)
            heapq.heappush(training, (trained, number))
            heapq.heappush(uploading, (arrives, number))

    hand_out(concurrency, 0.0)
    initial_jobs = concurrency
    while newest < max_versions and uploading[0][0] <= max_time:
        now, number = heapq.heappop(uploading)
        while training and training[0][0] <= now:
            free.append(client[heapq.heappop(training)[1]])
        if fault[number] is Fault.LOST:
            lost += 1
            hand_out(1, now)
            if job:
                jobs_started[-1] = len(client)
            else:
                initial_jobs = len(client)
            continue
        job.append(number)
        staleness.append(newest - base_version[number])
        buffered += 1
        if buffered == buffer_size:
            newest += 1
            buffered = 0
        open_now += 1
        if open_now == open_slots:
            hand_out(open_now, now)
            open_now = 0
        version.append(newest)
        jobs_started.append(len(client))

    arrival_of_job = np.full(len(client), -1, np.int64)
    arrival_of_job[job] = np.arange(len(job))
    return Schedule(
        client=np.asarray(client, np.int64),
        visit=np.asarray(visit, np.int64),
        base_version=np.asarray(base_version, np.int64),
        start=np.asarray(start, np.float64),
        train_end=np.asarray(train_end, np.float64),
        arrival_time=np.asarray(arrival_time, np.float64),
        fault=np.asarray(fault, np.int8),
        arrival_of_job=arrival_of_job,
        job=np.asarray(job, np.int64),
        staleness=np.asarray(staleness, np.int64),
        version=np.asarray(version, np.int64),
        jobs_started=np.asarray(jobs_started, np.int64),
        initial_jobs=initial_jobs,
        lost=lost,
    )


def in_flight(schedule: Schedule, position: int) -> np.ndarray:
    """Which jobs are handed out and have not arrived once `position` arrivals are processed.

    Those that will be lost do not count: they are given up when they are handed out.

    Returns:
      bool array [jobs].
    """
    handed_out = schedule.jobs_started[position - 1] if position else schedule.initial_jobs
    arrived = (schedule.arrival_of_job >= 0) & (schedule.arrival_of_job < position)
    waited_for = ~arrived & (schedule.fault != Fault.LOST)
    return (np.arange(len(schedule.client)) < handed_out) & waited_for


def restart_in_flight(schedule: Schedule, position: int, version: int) -> Schedule:
    """The plan if the jobs in flight after `position` arrivals start again from another version.

    Nobody works longer or arrives otherwise: only what these jobs start from, and so the staleness
    of their arrivals, is another.

    Args:
      schedule: the plan.
      position: arrivals processed so far.
      version: the version that these jobs start from now.
    """
    jobs = in_flight(schedule, position)
    arrivals = schedule.arrival_of_job[jobs & (schedule.arrival_of_job >= 0)]
    base_version, staleness = schedule.base_version.copy(), schedule.staleness.copy()
    staleness[arrivals] += base_version[schedule.job[arrivals]] - version
    base_version[jobs] = version
    return dataclasses.replace(schedule, base_version=base_version, staleness=staleness)


def staleness_summary(staleness: np.ndarray) -> dict[str, float]:
    """Mean and quantiles of staleness, zero without arrivals."""
    values = staleness if len(staleness) else np.zeros(1)
    quantiles = np.quantile(values, [0.5, 0.9, 0.99])
    names = ("staleness_p50", "staleness_p90", "staleness_p99")
    return {
        "staleness_mean": float(np.mean(values)),
        **dict(zip(names, map(float, quantiles), strict=True)),
    }
