"""The global model of a recorded run, and how good it is; needs nothing else of the run."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from fedrevive_jax import data, models
from fedrevive_jax.clients import feed as feeds
from fedrevive_jax.clients.evaluation import make_evaluator
from fedrevive_jax.compute import environment
from fedrevive_jax.compute.streams import Stream, jax_key
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.models import Model
from fedrevive_jax.models.t5_weights import digest, read_shape
from fedrevive_jax.record import derived
from fedrevive_jax.record.reading import read_config, read_params


def evaluate_checkpoint(
    folder: Path,
    *,
    step: int | None = None,
    split: str | None = None,
    data_dir: str | None = None,
    t5_weights: str | None = None,
    dataset: data.Dataset | None = None,
    model: Model | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint as the run itself did.

    Args:
      folder: the run's folder.
      step: global version; the newest checkpoint where None.
      split: the run's own where None.
      data_dir, t5_weights: where the data and the pretrained weights lie, if not where they lay.
      dataset, model: stand in for those that the configuration names.

    Returns:
      version, split, accuracy, loss, per_class_accuracy (None for a class without samples).
    """
    environment.check()
    config, kept = read_config(folder), derived.read(folder)
    if t5_weights and not config.t5_weights:
        raise ConfigError("t5_weights", t5_weights, f"{folder} did not start from such weights")
    moved = {"data_dir": data_dir, "t5_weights": t5_weights}
    moved = {name: value for name, value in moved.items() if value is not None}
    config = dataclasses.replace(config, **moved)
    if config.t5_weights and kept.origin:
        _check_weights(config.t5_weights, kept.origin.get("weights_sha256"))
    if dataset is None:
        dataset = data.load(config, kept.tokenizer)
    split = split or config.eval_split
    if model is None:
        model = models.from_config(config, dataset.input_shape, dataset.num_classes)
    model = models.with_precision(model, config.precision)
    version, params = read_params(folder, model, step)
    feed = feeds.create(dataset, model.frozen(jax_key(config.seed, Stream.MODEL_INIT)))
    result = make_evaluator(model, feed.evaluation, config.eval_batch)(
        params, feed.store, jnp.asarray(dataset.labels), dataset.positions(split)
    )
    return {
        "version": version,
        "split": split,
        "accuracy": result.accuracy,
        "loss": result.loss,
        "per_class_accuracy": [None if a != a else a for a in result.per_class],
    }


def _check_weights(folder: str, expected: str | None) -> None:
    """The frozen token table comes from these weights, so they must be those of the run."""
    read_shape(folder)  # tells what is wrong with the folder
    if digest(folder) != expected:
        raise ConfigError(
            "t5_weights",
            folder,
            f"are not the weights that the run started from (SHA-256 {expected})",
        )
