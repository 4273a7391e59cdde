"""Data sets: a source per file, one record for all, loaded by name."""

import atexit
import contextlib
import importlib
from pathlib import Path
from types import ModuleType

from fedrevive_jax.compute import buckets
from fedrevive_jax.config import Config, is_bucket
from fedrevive_jax.data import tokens
from fedrevive_jax.data.dataset import (
    Dataset,
    DatasetSpec,
    Preprocessing,
    split_sizes,
    split_training,
)
from fedrevive_jax.data.texts import Texts
from fedrevive_jax.errors import ConfigError

__all__ = [
    "SOURCES", "Dataset", "DatasetSpec", "Preprocessing", "Texts", "digest", "load",
    "preprocessing", "spec", "split_sizes", "split_training",
]  # fmt: skip

# name -> module with `load(data_dir: str, seed: int) -> Dataset | Texts` and, where it is known
# beforehand, `SPEC: DatasetSpec | TextSpec`; imported only when it is asked for, so that a digits
# run does not import what other sources need.
SOURCES = {
    "digits": "fedrevive_jax.data.digits",
    "fashion_mnist": "fedrevive_jax.data.fashion_mnist",
    "cifar10": "fedrevive_jax.data.cifar10",
    "cifar100": "fedrevive_jax.data.cifar100",
    "femnist": "fedrevive_jax.data.femnist",
    "newsgroups": "fedrevive_jax.data.newsgroups",
    "image_folder": "fedrevive_jax.data.image_folder",
    "text_folder": "fedrevive_jax.data.text_folder",
}


def load(config: Config, tokenizer: str = "") -> Dataset:
    """The data set that a configuration names, texts as token ids.

    Args:
      config: names the data set and where it lies.
      tokenizer: JSON of a tokenizer that was trained on these texts before.

    Raises:
      ConfigError: when files are missing, cut short or not what they should be.
    """
    loaded = _read(config)
    if not isinstance(loaded, Texts):
        return loaded
    if config.t5_weights:
        chosen = tokens.read(config.t5_weights)
    elif tokenizer:
        chosen = tokens.from_json(tokenizer)
    else:
        training = [loaded.texts[i] for i in loaded.splits["train"]]
        chosen = tokens.train(training, config.vocabulary_size)
    return Dataset(
        loaded.name,
        loaded.num_classes,
        tokens.encode(chosen, loaded.texts, config.text_length),
        loaded.labels,
        loaded.splits,
        class_names=loaded.class_names,
        tokenizer=chosen,
        source_digest=loaded.source_digest,
    )


def digest(config: Config) -> str:
    """`Dataset.digest` of the data set that a configuration names; texts are not tokenised.

    Raises:
      ConfigError: see `load`.
    """
    return _read(config).digest


def spec(config: Config) -> DatasetSpec:
    """What is known of the named data set; only a user's own folders are read for it."""
    source = _source(config)
    known = getattr(source, "SPEC", None)
    if isinstance(known, DatasetSpec):
        return known
    if known is None:
        loaded = _read(config)
        count = sum(len(loaded.splits[name]) for name in ("train", "validation", "distillation"))
        tested = len(loaded.splits["test"])
        if isinstance(loaded, Dataset):
            return DatasetSpec(loaded.input_shape, loaded.num_classes, count, tested)
        return DatasetSpec((config.text_length,), loaded.num_classes, count, tested)
    return DatasetSpec((config.text_length,), *known)


def preprocessing(config: Config) -> Preprocessing:
    """How the images of the named data set become inputs."""
    return getattr(_source(config), "PREPROCESSING", Preprocessing())


def _read(config: Config) -> Dataset | Texts:
    """What the source reads. Data in a bucket are copied to this machine first, once a process."""
    load = _source(config).load
    if not is_bucket(config.data_dir):
        return load(config.data_dir, config.seed)
    key = (config.data_dir, config.dataset)
    if key not in _copies:
        stack = contextlib.ExitStack()

        def wanted(name: str) -> bool:  # other data sets may be prepared beside this one
            own = config.dataset.endswith("_folder") or "/" not in name
            return own or name.startswith(f"{config.dataset}/")

        _copies[key] = stack.enter_context(buckets.copied(config.data_dir, "data_dir", wanted))
        atexit.register(stack.close)
    with buckets.named(_copies[key], config.data_dir):
        return load(str(_copies[key]), config.seed)


# Copies of data in buckets, by place and name of the data set.
_copies: dict[tuple[str, str], Path] = {}


def _source(config: Config) -> ModuleType:
    if config.dataset not in SOURCES:
        raise ConfigError(
            "dataset",
            config.dataset,
            "is given to `run` from Python; by name: " + ", ".join(SOURCES),
        )
    return importlib.import_module(SOURCES[config.dataset])
