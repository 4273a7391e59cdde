"""What a recorded run was: its configuration, and the global model of its checkpoints."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from fedrevive_jax.compute.streams import root_key
from fedrevive_jax.config import Config
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.models import Model
from fedrevive_jax.models.model import Params
from fedrevive_jax.record import files
from fedrevive_jax.record.archive import CorruptError
from fedrevive_jax.record.checkpoint import Checkpoints


def read_config(folder: Path) -> Config:
    """The configuration of a recorded run.

    Raises:
      ConfigError: the file is missing, or not a configuration of this version of the package.
    """
    recorded = files.read_json(folder / files.CONFIG)
    names = {field.name for field in dataclasses.fields(Config)}
    if not isinstance(recorded, dict) or set(recorded) != names:
        raise ConfigError(
            "workdir",
            folder,
            f"{files.CONFIG} is not a configuration of this version of fedrevive_jax",
        )
    return Config(**recorded)


def read_params(
    folder: Path, model: Model, step: int | None = None, flag: str = "workdir"
) -> tuple[int, Params]:
    """The global model of a checkpoint: (version, parameters).

    Without a step it is the newest checkpoint that is whole; of newer ones that are not, a warning
    is logged.

    Raises:
      ConfigError: there is no such checkpoint, it is corrupt or of another model; `flag` is blamed.
    """
    checkpoints = Checkpoints(folder, read_only=True, flag=flag)
    shapes = jax.eval_shape(model.init, root_key())
    if step is None:
        found = checkpoints.newest_good(lambda step: checkpoints.params(step, shapes))
        if found is None:
            raise ConfigError(flag, folder, "holds no checkpoint")
        step, params = found
    else:
        try:
            params = checkpoints.params(step, shapes)
        except CorruptError as error:
            raise ConfigError(flag, folder, f"checkpoint {step} is corrupt ({error})") from None
    return step, jax.tree.map(jnp.asarray, params)
