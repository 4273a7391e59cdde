"""Evaluates a checkpoint: python -m experiments.evaluate --workdir=DIR [--step=N].

Restores the global model alone and prints JSON; the figures equal the run's own.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
from absl import flags

from experiments import flags as config_flags
from fedrevive_jax import data, record
from fedrevive_jax.checkpoint import Checkpoints
from fedrevive_jax.config import Config, ConfigError
from fedrevive_jax.data import augment
from fedrevive_jax.evaluation import make_evaluator
from fedrevive_jax.simulator import make_model

WORKDIR = flags.DEFINE_string("workdir", None, "folder of a run")
STEP = flags.DEFINE_integer("step", None, "global version; default: the newest checkpoint")
SPLIT = flags.DEFINE_string("split", None, "test or validation; default: the run's own")
DATA_DIR = flags.DEFINE_string("data_dir", None, "where the data lie, if not where they lay")


def main() -> None:
    if not WORKDIR.value:
        raise ConfigError("--workdir=: must name the folder of a run")
    folder = Path(WORKDIR.value)
    recorded = record.read_json(folder / record.CONFIG)
    config = Config(**recorded)
    if DATA_DIR.value is not None:
        config = dataclasses.replace(config, data_dir=DATA_DIR.value)
    if SPLIT.value is not None:
        config = _with_split(config, SPLIT.value)

    checkpoints = Checkpoints(folder, read_only=True)
    steps = checkpoints.steps()
    if not steps:
        raise ConfigError(f"--workdir={folder}: holds no checkpoint")
    step = steps[-1] if STEP.value is None else STEP.value
    dataset = data.load(config)
    model = make_model(config, dataset)
    params = checkpoints.params(step, jax.eval_shape(model.init, jax.random.key(0)))
    evaluate = make_evaluator(
        model,
        functools.partial(augment.plain_inputs, how=dataset.preprocessing),
        config.eval_batch,
    )
    result = evaluate(params, dataset.images, dataset.labels, dataset.splits[config.eval_split])
    print(
        json.dumps(
            {
                "workdir": str(folder),
                "version": step,
                "split": config.eval_split,
                "accuracy": result.accuracy,
                "loss": result.loss,
                "per_class_accuracy": [None if a != a else a for a in result.per_class],
            },
            indent=2,
        )
    )


def _with_split(config: Config, split: str) -> Config:
    try:
        return dataclasses.replace(config, eval_split=split)
    except ConfigError:
        raise ConfigError(f"--split={split}: must be one of test, validation") from None


if __name__ == "__main__":
    config_flags.run(main)
