"""What a server tells its clients to do: a whitelist of settings, checked on both sides.

A client runs the code that it has installed, on data and paths of its own. It takes from the server
the sizes of the model, the rate and length of its training, and how its data are to be read: the
names of the classes, whose numbers the server gives, and how images become inputs.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedrevive_jax.config import Config
from fedrevive_jax.data import Dataset, Preprocessing
from fedrevive_jax.errors import ConfigError, FileError

# Fields of `Config` that a client takes from the server. No path is among them.
FIELDS = (
    "seed", "model", "model_width", "model_layers", "model_heads", "vocabulary_size",
    "text_length", "local_iterations", "batch_size", "client_lr",
)  # fmt: skip
LONGEST_NAME = 1000  # of a class


@dataclass(frozen=True)
class Settings:
    """What all clients of a federation have in common.

    Attributes:
      fields: the values of `FIELDS`.
      classes: names in the order of the server's labels.
      input_shape: of a sample, see `Dataset.input_shape`.
      preprocessing: how images become inputs.
      weights_sha256: of the pretrained weights that the server started from; empty: from none.
    """

    fields: dict[str, Any]
    classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    preprocessing: Preprocessing
    weights_sha256: str = ""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def of_server(config: Config, dataset: Dataset, origin: dict[str, str]) -> Settings:
    """What a server tells, by its own configuration and data set, and where its model comes from.

    Raises:
      ConfigError: its model is one that no client can build by name.
    """
    if config.model == "custom":
        raise ConfigError("model", config.model, "must be one by name: clients build it, too")
    return Settings(
        {name: getattr(config, name) for name in FIELDS},
        dataset.classes,
        dataset.input_shape,
        dataset.preprocessing,
        origin.get("weights_sha256", ""),
    )


def from_json(text: str) -> Settings:
    """Settings as they came over a network.

    Raises:
      ConfigError: they are not settings, or more than settings.
    """
    try:
        given = json.loads(text)
        fields, classes = given["fields"], tuple(given["classes"])
        settings = Settings(
            {name: fields[name] for name in FIELDS},
            classes,
            tuple(map(int, given["input_shape"])),
            _preprocessing(**given["preprocessing"]),
            str(given["weights_sha256"]),
        )
        well_named = all(isinstance(name, str) and len(name) < LONGEST_NAME for name in classes)
        well_formed = set(given) == set(dataclasses.asdict(settings)) and set(fields) == set(FIELDS)
        if well_named and well_formed:
            return settings
    except (ValueError, RecursionError, AttributeError, LookupError, TypeError):
        pass
    raise ConfigError("settings", None, "what the server sent are no settings of this version")


def _preprocessing(
    crop_padding: Any, flip: Any, rotation: Any, mean: Any, std: Any
) -> Preprocessing:
    """What came, as the numbers that they have to be."""
    if not isinstance(flip, bool):
        raise TypeError("flip must be true or false")
    return Preprocessing(
        int(crop_padding), flip, float(rotation), tuple(map(float, mean)), tuple(map(float, std))
    )


def configured(settings: Settings, own: Config) -> Config:
    """A client's configuration: the server's settings over its own.

    Args:
      settings: what the server told.
      own: names the data set and where it lies, pretrained weights, and how to compute.

    Raises:
      ConfigError: a value is not allowed.
    """
    return dataclasses.replace(own, **settings.fields)


def as_served(settings: Settings, dataset: Dataset) -> Dataset:
    """A client's data set with the server's numbers of the classes.

    Raises:
      FileError: it has a class that the server does not know, or other samples.
    """
    where = f"data set {dataset.name}"
    if dataset.input_shape != settings.input_shape:
        raise FileError(
            where,
            f"its samples are {list(dataset.input_shape)}; the server's are "
            f"{list(settings.input_shape)}",
        )
    numbers = {name: number for number, name in enumerate(settings.classes)}
    unknown = [name for name in dataset.classes if name not in numbers]
    if unknown:
        raise FileError(
            where,
            f"has a class {unknown[0]!r}; the server knows {', '.join(settings.classes[:10])}"
            + (", ..." if settings.classes[10:] else ""),
        )
    own = [numbers[name] for name in dataset.classes]
    return dataclasses.replace(
        dataset,
        num_classes=len(settings.classes),
        labels=np.asarray(own, np.int32)[dataset.labels],
        class_names=settings.classes,
        preprocessing=settings.preprocessing,
    )
