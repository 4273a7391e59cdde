"""Data sets: a source per file, one record for all, loaded by name."""

import importlib
from types import ModuleType

from fedrevive_jax.config import Config, ConfigError
from fedrevive_jax.data.dataset import Dataset, DatasetSpec, Preprocessing, split_training

__all__ = ["SOURCES", "Dataset", "DatasetSpec", "Preprocessing", "load", "spec", "split_training"]

# name -> module with `SPEC: DatasetSpec` and `load(data_dir: str, seed: int) -> Dataset`; imported
# only when it is asked for, so that a digits run does not import what other sources need.
SOURCES = {
    "digits": "fedrevive_jax.data.digits",
    "fashion_mnist": "fedrevive_jax.data.fashion_mnist",
}


def load(config: Config) -> Dataset:
    """The data set that a configuration names.

    Raises:
      ConfigError: when files are missing, cut short or not what they should be.
    """
    return _source(config).load(config.data_dir, config.seed)


def spec(config: Config) -> DatasetSpec:
    """What is known of the named data set without reading it."""
    return _source(config).SPEC


def _source(config: Config) -> ModuleType:
    if config.dataset not in SOURCES:
        raise ConfigError(
            f"--dataset={config.dataset}: is given from Python, run(config, dataset=...); by name: "
            + ", ".join(SOURCES)
        )
    return importlib.import_module(SOURCES[config.dataset])
