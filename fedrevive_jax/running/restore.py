"""The global model of a recorded run, and how good it is; needs nothing else of the run."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedrevive_jax import data
from fedrevive_jax.clients import feed as feeds
from fedrevive_jax.clients.evaluation import make_evaluator
from fedrevive_jax.compute import buckets, devices, environment
from fedrevive_jax.compute.streams import Stream, jax_key
from fedrevive_jax.config import is_bucket
from fedrevive_jax.data import tokens
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.models import Model, judging
from fedrevive_jax.models.t5_weights import WEIGHTS, digest, read_shape
from fedrevive_jax.record import derived
from fedrevive_jax.record.checkpoint import FOLDER, STATE, drop_unfinished
from fedrevive_jax.record.reading import read_config, read_params

# Names of classes that a message lists.
SHOWN = 20

_LOG = logging.getLogger(__name__)


def evaluate_checkpoint(
    folder: Path | str,
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
      folder: the run's folder, also in a bucket.
      step: global version; the newest checkpoint where None.
      split: the run's own where None.
      data_dir, t5_weights: where the data and the pretrained weights lie, if not where they lay.
      dataset, model: stand in for those that the configuration names.

    Returns:
      version, split, accuracy, loss; per_class_accuracy by the name of the class, None for one
      without samples; same_data, whether the data are those of the run. On others, classes are
      matched by name.

    Raises:
      ConfigError: a file of the run is missing or has changed, or the data hold a class that the
        run does not know.
    """
    environment.check()
    if is_bucket(folder):
        with buckets.copied(folder, "workdir", _of_the_model) as copy:
            drop_unfinished(copy)
            return evaluate_checkpoint(
                copy,
                step=step,
                split=split,
                data_dir=data_dir,
                t5_weights=t5_weights,
                dataset=dataset,
                model=model,
            )
    folder = Path(folder)
    config, kept = read_config(folder), derived.read_known(folder)
    if t5_weights and not config.t5_weights:
        raise ConfigError("t5_weights", t5_weights, f"{folder} did not start from such weights")
    moved = {"data_dir": data_dir, "t5_weights": t5_weights}
    moved = {name: value for name, value in moved.items() if value is not None}
    config = dataclasses.replace(config, **moved)
    if config.t5_weights:
        _check_weights(config.t5_weights, kept.origin)
    if dataset is None:
        dataset = data.load(config, kept.tokenizer)
    judging.check_kind(dataset)
    same = dataset.digest == kept.sources.data_sha256
    if not same:
        _LOG.warning("workdir=%s: these are not the data of the run, or they have changed", folder)
        dataset = with_classes(dataset, kept.sources.classes, config.data_dir)
    split = split or config.eval_split
    model = judging.fitting(config, dataset, model)
    version, params = read_params(folder, model, step)
    feed = feeds.make_feed(dataset, model.frozen(jax_key(config.seed, Stream.MODEL_INIT)))
    store, labels = devices.replicate(None, (feed.store, dataset.labels))
    result = make_evaluator(model, feed.evaluation, config.eval_batch)(
        params, store, labels, dataset.positions(split)
    )
    return {
        "version": version,
        "split": split,
        "accuracy": result.accuracy,
        "loss": result.loss,
        "per_class_accuracy": {
            name: None if own != own else own
            for name, own in zip(dataset.classes, result.per_class, strict=True)
        },
        "same_data": same,
    }


def _of_the_model(name: str) -> bool:
    """The files of a run that its evaluation needs."""
    part = name.partition("/")[0]
    return name.endswith(".json") if part == name else part == FOLDER and STATE not in name


def with_classes(dataset: data.Dataset, classes: Sequence[str], where: str) -> data.Dataset:
    """A data set whose labels number other classes: of each the place of its name.

    Args:
      dataset: holds some of the classes.
      classes: names, in the order of the labels that are wanted.
      where: where the data set lies, for the message.

    Raises:
      ConfigError: it holds a class that is not among them.
    """
    for name in dataset.classes:
        if name not in classes:
            known = ", ".join(classes[:SHOWN]) + (", ..." if len(classes) > SHOWN else "")
            raise ConfigError("data_dir", where, f"holds a class {name!r}; the run knows {known}")
    numbers = np.asarray([classes.index(name) for name in dataset.classes], np.int32)
    return dataclasses.replace(
        dataset,
        num_classes=len(classes),
        labels=numbers[dataset.labels],
        class_names=tuple(classes),
    )


def _check_weights(folder: str, origin: dict[str, str]) -> None:
    """The frozen token table and the tokenizer come from this folder, so they must be the run's."""
    read_shape(folder)  # tells what is wrong with the folder
    for name, words, found in (
        ("weights_sha256", WEIGHTS, digest(folder)),
        ("tokenizer_sha256", "tokenizer", tokens.digest(folder)),
    ):
        if found != origin.get(name):
            raise ConfigError(
                "t5_weights",
                folder,
                f"its {words} is not what the run started from (SHA-256 {origin.get(name)})",
            )
