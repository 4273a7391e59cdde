"""Texts with labels as a source reads them, before they are cut into tokens."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fedrevive_jax.data.dataset import check_parts, digest_of, digest_of_texts


class TextSpec(NamedTuple):
    """What is known of a text data set without reading it.

    Attributes:
      num_classes: number of classes.
      training_samples: official training texts, before they are split.
      test_samples: official test texts beside them.
    """

    num_classes: int
    training_samples: int
    test_samples: int = 0


@dataclass(frozen=True)
class Texts:
    """A text data set, once in memory.

    Attributes:
      name: for records and messages.
      class_names: a name for each class, in the order of the labels.
      texts: the texts of all splits.
      labels: int32 array [n].
      splits: positions in `texts`, the same splits as those of a `Dataset`.

    Raises:
      FileError: see `check_parts`.
    """

    name: str
    class_names: tuple[str, ...]
    texts: list[str]
    labels: np.ndarray
    splits: dict[str, np.ndarray]

    def __post_init__(self):
        check_parts(
            self.name,
            len(self.texts),
            self.labels,
            self.num_classes,
            self.splits,
            self.class_names,
        )

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @functools.cached_property
    def source_digest(self) -> str:
        """SHA-256 of the texts."""
        return digest_of_texts(self.texts)

    @property
    def digest(self) -> str:
        """That of the `Dataset` of these texts, however they are cut into tokens."""
        return digest_of(self.source_digest, self.class_names, self.labels, self.splits["test"])
