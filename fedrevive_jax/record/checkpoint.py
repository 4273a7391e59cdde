"""Checkpoints of a run: everything that an exact continuation needs, guarded by checksums.

    checkpoints/VERSION/params/      the global model alone, written by orbax for anyone to read
    checkpoints/VERSION/state.npz    the method's state
    checkpoints/VERSION/record.json  position, jobs in flight, and the checksums of the rows so
                                     far and of every file and every leaf that belong to this
                                     checkpoint; its own checksum is in record.json.sha256
    live/version_V.npz, live/upload_J.npz
                                     stale versions and uploads under way, written once each and
                                     referred to by every checkpoint that needs them

A checkpoint is made in a folder of another name, is durable before it gets its own, and has all
of its parts from that moment on. What no kept checkpoint refers to is deleted afterwards. A process
may die between any two of these steps.

orbax writes and reads the model; its CheckpointManager (0.12) is not used for the rest. It deletes
an old step in place: after a death in the midst of that it lists the step, and restores none of the
others either. It passes over a step that exists, but a run that ends within a buffer saves its last
version twice. It knows of no arrays that several steps share. And orbax restores changed bytes
silently; so what is restored is compared with the checksums. A CheckpointManager reads the folder
all the same.
"""

import logging
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from fedrevive_jax.errors import ConfigError, UserError
from fedrevive_jax.models.model import Params
from fedrevive_jax.record import archive
from fedrevive_jax.record.archive import CorruptError

FOLDER = "checkpoints"
LIVE = "live"
PARAMS, STATE, RECORD = "params", "state.npz", "record.json"
# Arrays of a snapshot that never change once they exist, by number; and the names of their files.
ONCE = {"stale": "version", "uploads": "upload"}

_LOG = logging.getLogger(__name__)
_Read = TypeVar("_Read")


class CheckpointError(UserError):
    """A checkpoint could not be written."""


class Saved(NamedTuple):
    """A checkpoint: its plain record, the global model, all other arrays; arrays of NumPy."""

    record: dict[str, Any]
    params: Params
    arrays: dict[str, Any]


def has_checkpoint(run_dir: Path) -> bool:
    """Whether a run's folder holds any checkpoint, told from the names alone."""
    return bool(_steps(run_dir / FOLDER))


def describe_newest(run_dir: Path) -> str:
    """Words for the newest checkpoint that is on disk."""
    steps = _steps(run_dir / FOLDER)
    return f"the newest on disk is of version {steps[-1]}" if steps else "there is none on disk"


def drop_unfinished(run_dir: Path) -> None:
    """Removes steps whose record has no seal, in a copy of a folder that a process wrote file by
    file and died."""
    for step in _steps(run_dir / FOLDER):
        if not (run_dir / FOLDER / str(step) / archive.seal_of(RECORD)).is_file():
            _remove(run_dir / FOLDER / str(step))


class Checkpoints:
    """The checkpoints of one run, by global version. One owner calls; writing is in a thread."""

    def __init__(
        self,
        run_dir: Path,
        keep: int = 2,
        read_only: bool = False,
        flag: str = "workdir",
        publish: Callable[[], None] = lambda: None,
    ):
        """Opens a run's folder.

        Args:
          run_dir: the folder.
          keep: how many checkpoints are kept.
          read_only: write nothing; then other processes may use the folder, too.
          flag: the flag to blame for what is wrong with the folder.
          publish: called by the thread that writes, when a checkpoint is whole.

        Raises:
          ConfigError: the folder is to be read and holds no checkpoints.
        """
        self._run_dir, self._keep = run_dir, keep
        self._read_only, self._flag, self._publish = read_only, flag, publish
        self._folder, self._live = run_dir / FOLDER, run_dir / LIVE
        self._thread: ThreadPoolExecutor | None = None
        self._writing: Future | None = None
        self._step_in_writing = -1
        # Checksums of what is in `live` that this process has written or found whole, by name.
        self._once: dict[str, archive.Sums] = {}
        if read_only:
            if not self._folder.is_dir():
                raise ConfigError(flag, run_dir, f"holds no folder {FOLDER}")
            return
        for folder in (self._folder, self._live):
            folder.mkdir(exist_ok=True)
        self._tidy()
        self._thread = ThreadPoolExecutor(1, "checkpoint")

    def steps(self) -> list[int]:
        """Versions of which there is a checkpoint on disk, oldest first; whole or not."""
        return _steps(self._folder)

    def newest_good(self, read: Callable[[int], _Read]) -> tuple[int, _Read] | None:
        """What `read` gives for the newest step that is whole; None where there is no step at all.

        Steps that are not whole are told in a warning. Whoever may write puts them out of the way,
        under the name STEP.corrupt, because the run will come to the same version again.

        Raises:
          ConfigError: there are steps, and none is whole.
        """
        bad = []
        for step in reversed(self.steps()):
            try:
                result = read(step)
            except CorruptError as error:
                if self._read_only and step not in self.steps():
                    # The run that writes here has replaced it meanwhile.
                    return self.newest_good(read)
                bad.append(step)
                _LOG.warning(
                    "%s=%s: checkpoint %d is corrupt (%s); trying the one before it",
                    self._flag, self._run_dir, step, error,
                )  # fmt: skip
                continue
            if not self._read_only:
                for step_aside in bad:
                    aside = self._folder / f"{step_aside}.corrupt"
                    _remove(aside)
                    (self._folder / str(step_aside)).rename(aside)
            return step, result
        if bad:
            raise ConfigError(
                self._flag,
                self._run_dir,
                "no checkpoint is whole; corrupt: " + ", ".join(map(str, bad)),
            )
        return None

    def record(self, step: int) -> dict[str, Any]:
        """The plain record of a checkpoint.

        Raises:
          CorruptError: it is missing or damaged.
        """
        return self._contents(step)["record"]

    def params(self, step: int, shapes: Params) -> Params:
        """The global model alone; `shapes` is a pytree of `jax.ShapeDtypeStruct` or arrays.

        Raises:
          ConfigError: there is no such step, or its parameters are shaped otherwise.
          CorruptError: it is not what was written.
        """
        if step not in self.steps():
            raise ConfigError(
                "step",
                step,
                f"no such checkpoint in {self._run_dir}; there is "
                + (", ".join(map(str, self.steps())) or "none"),
            )
        sums = self._contents(step)["sums"][PARAMS]
        self._check_shapes(sums["leaves"], shapes)
        return self._read_params(step, shapes, sums)

    def load(
        self,
        step: int,
        params_shapes: Params,
        shapes_of: Callable[[dict[str, Any]], dict[str, Any]],
    ) -> Saved:
        """A whole checkpoint.

        Args:
          step: the version.
          params_shapes: shapes of the global model.
          shapes_of: its record -> the structure and shapes of its arrays.

        Raises:
          CorruptError: it is not what was written.
        """
        contents = self._contents(step)
        record, sums = contents["record"], contents["sums"]
        shapes = shapes_of(record)
        params = self._read_params(step, params_shapes, sums[PARAMS])
        own = {name: tree for name, tree in shapes.items() if name not in ONCE}
        arrays = archive.read(self._folder / str(step) / STATE, own, sums[STATE])
        once = {}
        for group, kind in ONCE.items():
            arrays[group] = {}
            for number, tree in shapes[group].items():
                name = f"{kind}_{number}"
                arrays[group][number] = archive.read(self._path(name), tree, sums[name])
                once[name] = sums[name]
        self._once = once
        return Saved(record, params, arrays)

    def save(self, record: dict[str, Any], params: Params, arrays: dict[str, Any]) -> None:
        """Saves version `record["version"]` in the background, in the place of an earlier save.

        Args:
          record: plain, for JSON.
          params: the global model.
          arrays: a pytree of arrays; under the keys of `ONCE` pytrees by number that never change.

        Raises:
          CheckpointError: what went wrong with the save before, if anything did.
        """
        self.wait()
        own = {name: tree for name, tree in arrays.items() if name not in ONCE}
        once = {
            f"{kind}_{number}": tree
            for group, kind in ONCE.items()
            for number, tree in arrays[group].items()
        }
        # The next step of the method takes its own arrays' memory; all others stay as they are.
        own = jax.tree.map(_kept, own)
        self._step_in_writing = record["version"]
        assert self._thread is not None, "opened to be read only"
        self._writing = self._thread.submit(self._write, record, params, own, once)

    def check(self) -> None:
        """Raises what went wrong with the last save, as soon as it is known; never waits."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is on disk.

        Raises:
          CheckpointError: it is not, and why.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except Exception as error:  # orbax raises anything when a disk is full
            raise CheckpointError(
                f"{self._flag}={self._run_dir}: the checkpoint of version "
                f"{self._step_in_writing} could not be written ({_reason(error)}); "
                f"{describe_newest(self._run_dir)}"
            ) from error

    def close(self) -> None:
        """Waits for the last save; raises like `wait`."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()

    # --- reading ----------------------------------------------------------------------------------

    def _contents(self, step: int) -> dict[str, Any]:
        contents = archive.read_sealed(self._folder / str(step) / RECORD)
        try:
            version, sums = contents["record"]["version"], contents["sums"]
            known = {PARAMS, STATE} <= sums.keys() and all(map(archive.is_sums, sums.values()))
        except (KeyError, TypeError, AttributeError):
            version, known = None, False
        if not known:
            raise CorruptError(f"{RECORD} is none of this package")
        if version != step:
            raise CorruptError(f"it is the checkpoint of version {version}")
        return contents

    def _check_shapes(self, leaves: archive.Leaves, shapes: Params) -> None:
        """Names the first parameter of another model that differs from this one's."""
        stored = {name: leaf["shape"] for name, leaf in leaves.items()}
        wanted = {
            jax.tree_util.keystr(path, simple=True, separator="/"): list(leaf.shape)
            for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
        }
        for name in sorted(stored.keys() | wanted.keys()):
            found, expected = (side.get(name, "absent") for side in (stored, wanted))
            if found != expected:
                raise ConfigError(
                    self._flag,
                    self._run_dir,
                    f"its parameter {name} is {found}; this model's is {expected}",
                )

    def _read_params(self, step: int, shapes: Params, sums: archive.Sums) -> Params:
        blank = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        path = self._folder / str(step) / PARAMS
        archive.check_files(path, sums["files"])
        try:
            with _orbax() as orbax:
                params = orbax.restore(path.absolute(), args=ocp.args.StandardRestore(blank))
        except MemoryError:
            raise
        except Exception as error:  # orbax raises anything when it finds something else
            raise CorruptError(f"{PARAMS} cannot be read ({_reason(error)})") from None
        archive.check(params, sums["leaves"])
        return params

    # --- writing ----------------------------------------------------------------------------------

    def _path(self, name: str) -> Path:
        return self._live / f"{name}.npz"

    def _write(
        self, record: dict[str, Any], params: Params, own: dict[str, Any], once: dict[str, Any]
    ) -> None:
        final = self._folder / str(record["version"])
        partial, replaced = (
            final.with_name(f"{final.name}.{kind}") for kind in ("partial", "replaced")
        )
        sums = {}
        try:
            for name, tree in once.items():
                if name not in self._once or not self._path(name).exists():
                    self._once[name] = archive.write(self._path(name), archive.to_host(tree))
                sums[name] = self._once[name]
            archive.sync_folder(self._live)
            _remove(partial)
            partial.mkdir()
            sums[STATE] = archive.write(partial / STATE, own)
            params = archive.to_host(params)
            with _orbax() as orbax:
                orbax.save((partial / PARAMS).absolute(), args=ocp.args.StandardSave(params))
            files = archive.sum_files(partial / PARAMS)
            sums[PARAMS] = {"files": files, "leaves": archive.describe(params)}
            archive.write_sealed(partial / RECORD, {"record": record, "sums": sums})
            archive.sync_folder(partial)
        except BaseException:
            _remove(partial)
            raise
        if final.exists():
            _remove(replaced)
            final.rename(replaced)  # see `_tidy` for a death between the two
        partial.rename(final)
        archive.sync_folder(self._folder)
        _remove(replaced)
        self._collect_garbage()
        self._publish()

    def _collect_garbage(self) -> None:
        """Deletes old checkpoints, then what no checkpoint refers to."""
        steps = self.steps()
        for step in steps[: -self._keep]:
            # By another name first: what is half deleted must not look like a checkpoint.
            removed = self._folder / f"{step}.removed"
            (self._folder / str(step)).rename(removed)
            _remove(removed)
        needed: set[str] = set()
        for step in steps[-self._keep :]:
            try:
                needed |= self._contents(step)["sums"].keys()
            except CorruptError:
                continue  # whatever it referred to is of no use any more
        for path in self._live.iterdir():
            if path.name.removesuffix(".npz") not in needed:
                path.unlink()
        self._once = {name: sums for name, sums in self._once.items() if name in needed}

    def _tidy(self) -> None:
        """Finishes what a process that died here left half done."""
        for path in self._folder.iterdir():
            final = path.with_suffix("")
            if path.suffix == ".replaced" and not final.exists():
                path.rename(final)
            elif path.suffix in (".partial", ".replaced", ".removed"):
                _remove(path)


def _kept(leaf: Any) -> Any:
    """An array on the host that nobody changes."""
    # A cache on disk gives a copy already, which is too large for memory.
    if isinstance(leaf, np.memmap):
        return leaf
    # Of a device's own memory the host gets a copy in any case; of a CPU's only a view.
    if isinstance(leaf, jax.Array) and all(d.platform != "cpu" for d in leaf.devices()):
        return np.asarray(leaf)
    return np.array(leaf, copy=True)


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    names = (path.name for path in folder.iterdir())
    return sorted(int(n) for n in names if n.isascii() and n.isdecimal() and n == str(int(n)))


def _orbax() -> ocp.Checkpointer:
    """Reads and writes in this process alone, whatever others there are, and returns when done."""
    here = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"process{here}"
    )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # What tensorstore raises is long, and ends in its settings.
    number = re.search(r"os_error_code='(\d+)'", str(error))
    if number is not None:
        return os.strerror(int(number[1]))
    return (str(error).strip() or type(error).__name__).splitlines()[0]
