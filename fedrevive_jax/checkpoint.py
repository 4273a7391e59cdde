"""Checkpoints of a run with orbax: everything that an exact continuation needs.

A step holds three items: `params` (the global model alone, for evaluation), `state` (method state,
stale versions, uploads under way) and `record` (plain numbers: position, jobs in flight, sizes of
the run's files).
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from fedrevive_jax.config import ConfigError
from fedrevive_jax.models.model import Params

FOLDER = "checkpoints"


def has_checkpoint(run_dir: Path) -> bool:
    """Whether a run's folder holds any checkpoint, told from the names alone."""
    folder = run_dir / FOLDER
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


class Checkpoints:
    """The checkpoints of one run, by global version."""

    def __init__(
        self, run_dir: Path, keep: int = 2, read_only: bool = False, flag: str = "workdir"
    ):
        folder = (run_dir / FOLDER).absolute()
        if read_only:
            if not folder.is_dir():
                raise ConfigError(f"--{flag}={run_dir}: holds no folder {FOLDER}")
            options = ocp.CheckpointManagerOptions(read_only=True, multiprocessing_options=_alone())
        else:
            folder.mkdir(parents=True, exist_ok=True)
            options = ocp.CheckpointManagerOptions(
                create=False,
                preservation_policy=checkpoint_managers.LatestN(keep),
                cleanup_tmp_directories=True,
                multiprocessing_options=_alone(),
            )
        self._run_dir = run_dir
        self._flag = flag
        self._manager = ocp.CheckpointManager(
            folder,
            options=options,
            item_handlers={
                "params": ocp.StandardCheckpointHandler(multiprocessing_options=_alone()),
                "state": ocp.StandardCheckpointHandler(multiprocessing_options=_alone()),
                "record": ocp.JsonCheckpointHandler(multiprocessing_options=_alone()),
            },
        )

    def steps(self) -> list[int]:
        """Versions of which there is a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, record: dict[str, Any], params: Params, arrays: dict[str, Any]) -> None:
        """Saves the version `record["version"]` in the background, unless it is saved already.

        Raises what went wrong with the save before, if anything did.
        """
        self._manager.check_for_errors()
        step = record["version"]
        # Never replaced: a run could die between deleting the old and writing the new one. What
        # arrived since (a part of a buffer) is repeated when the run continues.
        if step in self.steps():
            return
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                state=ocp.args.StandardSave(arrays),
                record=ocp.args.JsonSave(record),
            ),
        )
        if not saved:
            raise RuntimeError(f"orbax did not save version {step} in {self._run_dir / FOLDER}")

    def record(self, step: int) -> dict[str, Any]:
        """The plain part of a checkpoint."""
        return self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))[
            "record"
        ]

    def params(self, step: int, shapes: Params) -> Params:
        """The global model alone; `shapes` is a pytree of `jax.ShapeDtypeStruct` or arrays.

        Raises:
          ConfigError: there is no such step, or its parameters are shaped otherwise.
        """
        if step not in self.steps():
            raise ConfigError(
                f"--step={step}: no such checkpoint in {self._run_dir}; there is "
                + (", ".join(map(str, self.steps())) or "none")
            )
        self._check_shapes(step, shapes)
        return self._restore(step, params=shapes)["params"]

    def _check_shapes(self, step: int, shapes: Params) -> None:
        """Names the first parameter that differs; orbax tells it in many lines, in threads."""
        try:
            stored = _shapes_by_name(self._manager.item_metadata(step)["params"].tree)
        except (KeyError, AttributeError, ValueError, OSError):
            raise ConfigError(
                f"--{self._flag}={self._run_dir}: its checkpoint {step} is no model of this package"
            ) from None
        wanted = _shapes_by_name(shapes)
        for name in sorted(stored.keys() | wanted.keys()):
            found, expected = (
                list(side[name]) if name in side else "absent" for side in (stored, wanted)
            )
            if found != expected:
                raise ConfigError(
                    f"--{self._flag}={self._run_dir}: its parameter {name} is {found}; "
                    f"this model's is {expected}"
                )

    def state(
        self, step: int, params_shapes: Params, shapes: dict[str, Any]
    ) -> tuple[Params, dict[str, Any]]:
        """The global model and all arrays of a snapshot."""
        restored = self._restore(step, params=params_shapes, state=shapes)
        return restored["params"], restored["state"]

    def wait(self) -> None:
        """Waits for the last save and raises its errors."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def close(self) -> None:
        """Waits for the last save, raises its errors and frees what the manager holds."""
        self.wait()
        self._manager.close()

    def _restore(self, step: int, **items: Any) -> Any:
        # Naming the device lets a checkpoint written on one kind of device be read on another.
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def placed(leaf):
            if isinstance(leaf, np.ndarray):
                return leaf  # belongs on the host
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)

        arguments = {
            name: ocp.args.StandardRestore(jax.tree.map(placed, shapes))
            for name, shapes in items.items()
        }
        return self._manager.restore(step, args=ocp.args.Composite(**arguments))


def _alone() -> ocp.options.MultiprocessingOptions:
    """This process waits for no other."""
    here = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"process{here}"
    )


def _shapes_by_name(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the leaves by their path, like conv1/kernel."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
