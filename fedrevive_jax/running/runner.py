"""A whole run: the simulation with its record, continued where it was interrupted."""

import contextlib
import dataclasses
import errno
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import jax
from jax.experimental import multihost_utils

from fedrevive_jax import data
from fedrevive_jax.compute import buckets, environment, processes
from fedrevive_jax.config import INPUT_FIELDS, LOCATION_FIELDS, Config, is_bucket
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.models import Model, convolutions, default_precision, judging
from fedrevive_jax.record import derived, files, lock, trackers
from fedrevive_jax.record.archive import seal_of
from fedrevive_jax.record.checkpoint import FOLDER as CHECKPOINTS
from fedrevive_jax.record.checkpoint import (
    RECORD,
    describe_newest,
    drop_unfinished,
    has_checkpoint,
)
from fedrevive_jax.record.health import DivergenceError, RejectLimitError
from fedrevive_jax.record.interruption import InterruptedRunError
from fedrevive_jax.record.reading import read_params
from fedrevive_jax.running.recorder import Recorder, Result, read_evaluations
from fedrevive_jax.running.runnable import Runnable
from fedrevive_jax.simulation.profiling import FOLDER as PROFILE
from fedrevive_jax.simulation.profiling import WindowTrace
from fedrevive_jax.simulation.simulator import Simulation

_LOG = logging.getLogger(__name__)

__all__ = [
    "DivergenceError", "RejectLimitError", "Result", "Stopping", "check_sources", "empty",
    "is_finished", "run", "settle",
]  # fmt: skip


class Stopping(Protocol):
    """What tells a run to save and stop."""

    @property
    def requested(self) -> bool: ...

    def share(self) -> None: ...


def run(
    config: Config,
    *,
    dataset: data.Dataset | None = None,
    model: Model | None = None,
    keep_record: bool = False,
    overwrite: bool = False,
    interruption: Stopping | None = None,
    profile: bool = False,
    make: Callable[..., Runnable] = Simulation,
    save_seconds: float = 0.0,
    publish: Callable[[], None] = lambda: None,
) -> Result:
    """Runs a configuration to its end.

    Where several processes compute together, every one of them calls this with the same arguments;
    the first alone reads and writes the folder.

    Args:
      config: what to run, see `presets.resolve`.
      dataset, model: stand in for those that the configuration names.
      keep_record: write `config.run_dir`, and continue from its newest checkpoint if there is one.
        A finished run is read, not run again.
      overwrite: start afresh in a folder that holds a run.
      interruption: asks the run to save and stop; no signal is handled without it.
      profile: trace a few windows of a simulation into the folder `profile` of the record.
      make: (config, dataset, model, derived) -> what is run; takes the arguments of `Simulation`.
      save_seconds: write a checkpoint as soon as the last one is so old, too; 0: by versions only.
      publish: called when a checkpoint is whole, by the thread that has written it; not for a run
        in a bucket, which is brought up to date then.

    Raises:
      ConfigError: the data, or the folder, is not what the configuration needs, or another process
        writes it. Nothing has been trained or written then.
      DivergenceError: training has diverged; the newest checkpoint is intact.
      RejectLimitError: more uploads than `reject_limit` allows were rejected; likewise.
      RecordError, CheckpointError: the folder cannot be written any more; likewise.
      InterruptedRunError: the run was asked to stop, and has saved.
    """
    config = settle(config)
    trackers.check(config)
    processes.agree(lambda: _computed(config))
    with contextlib.ExitStack() as stack:
        place = _Place(str(config.run_dir), publish)
        if keep_record and is_bucket(config.run_dir):
            config, place = stack.enter_context(_mirrored(config, overwrite))
        how = _How(make, interruption, profile, save_seconds)
        return _run(config, place, dataset, model, keep_record, overwrite, how)


class _How(NamedTuple):
    """How a run is made, stopped, traced and saved; see `run`."""

    make: Callable[..., Runnable]
    interruption: Stopping | None
    profile: bool
    save_seconds: float


class _Place(NamedTuple):
    """Where a run is recorded for good.

    Attributes:
      name: the folder, for the record; in a bucket while the run works in a copy.
      publish: brings the bucket up to date.
    """

    name: str
    publish: Callable[[], None] = lambda: None


def _run(
    config: Config,
    place: _Place,
    dataset: data.Dataset | None,
    model: Model | None,
    keep_record: bool,
    overwrite: bool,
    how: _How,
) -> Result:
    """See `run`; the configuration is settled, and its folder is on this machine."""

    def look() -> tuple[bool, derived.Derived]:
        finished = keep_record and _holds_finished(config, overwrite)
        # Without a checkpoint a run starts afresh, from the data as they are now.
        begun = keep_record and not overwrite and (finished or has_checkpoint(config.run_dir))
        return finished, derived.read(config.run_dir) if begun else derived.Derived()

    finished, kept = processes.first(look)

    def build() -> tuple[Runnable, derived.Sources]:
        loaded = dataset if dataset is not None else data.load(config, kept.tokenizer)
        judging.check_kind(loaded)
        sources = derived.sources_of(config, loaded.digest, loaded.classes)
        if kept.sources is not None:
            _check_sources(config, kept.sources, sources)
        return how.make(config, loaded, model, kept), sources

    made, sources = processes.together(build)
    processes.agree(
        lambda: {
            "the plan, the data or a file that is read": made.fingerprint,
            **made.settled,
        }
    )
    if finished:
        return processes.first(lambda: _read_finished(made))
    with contextlib.ExitStack() as stack:

        def open_folder() -> None:
            stack.enter_context(_opened(config, overwrite, place))
            if kept.sources is None:
                derived.write(config.run_dir, made.derived, sources)
            place.publish()

        stack.enter_context(_told(config.run_dir))
        if keep_record:
            processes.first(open_folder)
        folder = config.run_dir if keep_record and processes.is_first() else None
        return _play(made, folder, place.publish, how)


def _play(made: Runnable, folder: Path | None, publish: Callable[[], None], how: _How) -> Result:
    """Processes all arrivals that are left, and records them where there is a folder."""
    recorder = Recorder(made, folder, publish, how.save_seconds)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(recorder))
        recorder.resume()
        trace = None
        if how.profile and folder is not None:
            assert isinstance(made, Simulation), "only a simulation has windows"
            trace = WindowTrace(folder / PROFILE, made)
            stack.enter_context(contextlib.closing(trace))
        with _progress_bar(made) as progress:
            recorder.start()
            while not made.finished:
                if how.interruption and _shall_stop(how.interruption, made.position):
                    saved = processes.first(recorder.save_now)
                    raise InterruptedRunError(f"interrupted: {saved}")
                if trace is not None:
                    trace.before_arrival()
                receipt = made.advance()
                if receipt is None:  # nothing has come for a while
                    recorder.rest()
                    continue
                recorder.observe(receipt)
                if not progress.disable:
                    progress.set_postfix_str(recorder.news(), refresh=False)
                progress.update(1)
        if trace is not None and not (trace.taken or trace.running):
            _LOG.warning("profile: no window came after everything had run once; no trace")
        return recorder.finish()


def _shall_stop(interruption: Stopping, position: int) -> bool:
    """Whether a run stops before its next arrival, because it was asked to; several processes stop
    before the same one, whichever of them was asked."""
    if jax.process_count() == 1:
        return interruption.requested
    if not multihost_utils.reached_preemption_sync_point(position):
        return False
    interruption.share()
    return True


def settle(config: Config, platform: str | None = None) -> Config:
    """The configuration with what depends on the device at hand, on defaults and on the current
    folder made explicit.

    A run that was begun on one kind of device is not continued on another unless the flags say
    how to compute.

    Args:
      config: what to settle. What it says already stays.
      platform: JAX's name of the kind of device that will compute, where it is not that at hand.

    Raises:
      ConfigError: JAX's own settings, or its devices, are not what a run needs.
    """
    environment.check()
    platform = platform or jax.default_backend()
    config = dataclasses.replace(config, workdir=str(config.run_dir))
    paths = {name: getattr(config, name) for name in (*LOCATION_FIELDS, *INPUT_FIELDS)}
    return dataclasses.replace(
        config,
        **{
            name: str(Path(value).absolute())
            for name, value in paths.items()
            if value and not is_bucket(value)
        },
        convolution=convolutions.settled(config.convolution, platform),
        precision=default_precision(platform) if config.precision == "auto" else config.precision,
    )


def empty(config: Config) -> None:
    """Empties the folder of a run, so that the next `run` starts afresh, whatever it held.

    Raises:
      ConfigError: the folder is none of a run, or another process writes it.
    """
    config = settle(config)
    with contextlib.ExitStack() as stack:
        place = _Place(str(config.run_dir))
        if is_bucket(config.run_dir):
            config, place = stack.enter_context(_mirrored(config, overwrite=True))
        stack.enter_context(_opened(config, True, place))
        place.publish()


def is_finished(
    config: Config,
    overwrite: bool = False,
    digest_of: Callable[[Config], str] = data.digest,
) -> bool:
    """Whether the run's folder holds this run, finished, and on these data; writes nothing.

    The data of a finished run are read for that. Those that were given from Python are not known
    here; `run` holds them to the record.

    Args:
      config: what to run.
      overwrite: it is to be started afresh, whatever is there.
      digest_of: gives the digest of the data that a configuration names.

    Raises:
      ConfigError: the folder is not a run's folder, or holds a run of another configuration or on
        other data and must not be overwritten; or the data cannot be read.
    """
    with _at_hand(settle(config)) as config:
        if not _holds_finished(config, overwrite):
            return False
        check_sources(config, digest_of)
    return True


def check_sources(config: Config, digest_of: Callable[[Config], str] = data.digest) -> None:
    """Whether the run that is recorded was one on the data and files that are there now, and still
    has what it derived from them.

    Raises:
      ConfigError: it was not, or it has not.
    """
    with _at_hand(settle(config)) as config:
        kept = derived.read(config.run_dir).sources
        assert kept is not None
        named = config.dataset != "custom"
        digest = digest_of(config) if named else kept.data_sha256
        _check_sources(config, kept, derived.sources_of(config, digest, kept.classes))


def _check_sources(config: Config, kept: derived.Sources, now: derived.Sources) -> None:
    difference = derived.changed(kept, now)
    if difference:
        raise ConfigError(
            "workdir",
            config.run_dir,
            f"holds a run on {difference}; give another folder, or overwrite=True to start afresh",
        )


def _holds_finished(config: Config, overwrite: bool) -> bool:
    """Whether a run's folder holds this run, finished, whatever the data are."""
    folder = config.run_dir
    try:
        if folder.exists() and not folder.is_dir():
            raise ConfigError("workdir", folder, "is not a folder")
        contents = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    except OSError as error:
        raise ConfigError("workdir", folder, f"cannot be read ({error.strerror})") from None
    recorded = files.CONFIG in contents
    foreign = contents - {files.CONFIG + ".partial", lock.NAME}
    if foreign and not recorded:
        raise ConfigError(
            "workdir",
            folder,
            f"holds {min(foreign)} but no {files.CONFIG}; give an empty or a new folder",
        )
    if not recorded or overwrite:
        return False
    differences = files.configured_differently(folder, config)
    if differences:
        raise ConfigError(
            "workdir",
            folder,
            f"holds a run with another configuration "
            f"({'; '.join(differences)}); give another folder, or overwrite=True to start afresh",
        )
    return files.SUMMARY in contents


# The order in which files of a run come into a bucket; what is gone goes in the opposite order. The
# configuration goes last, because without it a folder is refused as foreign.
_IN_ORDER = (files.CONFIG, "", RECORD, seal_of(RECORD), files.SUMMARY)


def _order(name: str) -> int:
    last = name.rpartition("/")[2]
    return _IN_ORDER.index(last if last in _IN_ORDER else "")


def _stays_here(name: str) -> bool:
    """Files that mean something on one machine only."""
    return name == lock.NAME or name.endswith(".partial")


def _in_short(name: str) -> bool:
    """The files that tell what a run is, not what it found."""
    return (name.endswith(".json") and "/" not in name) or name == derived.CLIENTS


@contextlib.contextmanager
def _at_hand(config: Config) -> Iterator[Config]:
    """The configuration with a folder on this machine that tells what the run's folder is."""
    if not is_bucket(config.run_dir):
        yield config
        return
    with buckets.copied(config.run_dir, "workdir", _in_short) as folder:
        yield dataclasses.replace(config, workdir=str(folder))


@contextlib.contextmanager
def _mirrored(config: Config, overwrite: bool) -> Iterator[tuple[Config, _Place]]:
    """The configuration with a folder on this machine in the place of that in the bucket."""
    name = str(config.run_dir)
    mirror = buckets.Mirror(name, _order, _stays_here)
    with contextlib.closing(mirror), buckets.named(mirror.folder, name):

        def pull() -> None:
            mirror.pull(_in_short if overwrite else buckets.everything)
            drop_unfinished(mirror.folder)

        processes.first(pull)
        yield dataclasses.replace(config, workdir=str(mirror.folder)), _Place(name, mirror.push)


def _computed(config: Config) -> dict[str, object]:
    """What processes that compute together must have in common, by flag."""
    values = config.as_dict()
    return {name: values[name] for name in values if name not in LOCATION_FIELDS}


@contextlib.contextmanager
def _opened(config: Config, overwrite: bool, place: _Place) -> Iterator[None]:
    """Makes the run's folder and holds it alone; empties it if it is to be overwritten.

    Raises:
      ConfigError: it cannot be written, or another process holds it.
    """
    folder = config.run_dir
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            stack.enter_context(lock.exclusive(folder))
            # Looked at before without the lock: another run may have begun or finished here since.
            if _holds_finished(config, overwrite):
                raise ConfigError("workdir", folder, "another process has just finished this run")
            _prepare(config, overwrite, place)
        except OSError as error:
            raise ConfigError("workdir", folder, f"cannot be written ({error.strerror})") from None
        yield


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """A disk that is full, or a folder that is gone, becomes one line.

    Raises:
      RecordError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise files.RecordError(
            f"workdir={folder}: cannot be written any more ({error.strerror or error}); "
            f"{describe_newest(folder)}"
        ) from error


def _prepare(config: Config, overwrite: bool, place: _Place) -> None:
    """Empties a run's folder if it is to be overwritten, and writes config.json."""
    folder = config.run_dir
    if overwrite:
        # In an order in which a run that is interrupted here is never taken for whole: first what
        # says that it is finished, then what it would continue from. The configuration goes last,
        # because without it the folder would be refused as foreign.
        order = (files.SUMMARY, CHECKPOINTS, "", files.CONFIG)

        def rank(path: Path) -> int:
            return order.index(path.name if path.name in order else "")

        held = {folder / lock.NAME}
        for path in sorted(set(folder.iterdir()) - held, key=rank):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        place.publish()
    if not (folder / files.CONFIG).exists():
        files.write_json(folder / files.CONFIG, {**config.as_dict(), "workdir": place.name})


def _progress_bar(made: Runnable):
    from tqdm import tqdm

    return tqdm(
        total=made.planned_arrivals,
        initial=made.position,
        unit=" arrivals",
        disable=not (sys.stderr.isatty() and processes.is_first()),
        dynamic_ncols=True,
    )


def _read_finished(made: Runnable) -> Result:
    """The result of a run that is finished, from its record."""
    folder = made.config.run_dir
    _, params = read_params(folder, made.model)
    summary = files.read_json(folder / files.SUMMARY)
    return Result(params, summary, read_evaluations(folder))
