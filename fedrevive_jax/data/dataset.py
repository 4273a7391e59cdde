"""The record of a data set, and the split of its training part."""

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fedrevive_jax.compute.streams import Stream, numpy_generator
from fedrevive_jax.data.tokens import Tokenizer
from fedrevive_jax.errors import ConfigError, FileError


@dataclass(frozen=True)
class Preprocessing:
    """How byte images become model inputs; applied on the device, see `data.augment`.

    Attributes:
      crop_padding: pixels of padding before a random crop back to size; 0 is no crop.
      flip: whether images are flipped left-right at random.
      rotation: client images are turned at random by up to so many degrees; 0 is no turn.
      mean, std: per-channel normalisation of values in [0, 1]; empty is none.
    """

    crop_padding: int = 0
    flip: bool = False
    rotation: float = 0.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


class DatasetSpec(NamedTuple):
    """What is known of a data set without reading it.

    Attributes:
      input_shape: (height, width, channels) of one image, or (length,) of one text.
      num_classes: number of classes.
      training_samples: official training samples, before they are split.
    """

    input_shape: tuple[int, ...]
    num_classes: int
    training_samples: int


@dataclass(frozen=True)
class Dataset:
    """A data set, once in memory.

    Attributes:
      name: for records and messages.
      num_classes: number of classes.
      samples: all splits; uint8 images [n, height, width, channels], or int32 token ids
        [n, length] with padding (id 0) at the end.
      labels: int32 array [n].
      splits: positions of the samples of `train`, `validation`, `distillation` (real samples for
        the data-dependent reference method) and `test`.
      preprocessing: how images become inputs; unused for text.
      groups: natural owner of each sample, int array [n], or None.
      class_names: in the order of the labels, where they are known.
      tokenizer: how texts became token ids; None for images.
      source_digest: SHA-256 of the texts that were cut into token ids; empty where the samples are
        what was read.
    """

    name: str
    num_classes: int
    samples: np.ndarray
    labels: np.ndarray
    splits: dict[str, np.ndarray]
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    groups: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    tokenizer: Tokenizer | None = None
    source_digest: str = ""

    def __post_init__(self):
        kinds = ((np.uint8, 4), (np.int32, 2))
        if (self.samples.dtype, self.samples.ndim) not in kinds:
            raise ValueError(
                f"data set {self.name}: samples must be uint8 [n, height, width, channels] or "
                f"int32 [n, length]; are {self.samples.dtype} {list(self.samples.shape)}"
            )
        check_parts(self.name, len(self.samples), self.labels, self.num_classes, self.splits)

    def positions(self, split: str) -> np.ndarray:
        """Positions of a split's samples.

        Raises:
          ConfigError: there is no such split, or it holds nothing.
        """
        if split not in self.splits:
            allowed = ", ".join(sorted(self.splits))
            raise ConfigError("split", split, f"must be one of {allowed}")
        if not len(self.splits[split]):
            raise FileError(f"data set {self.name}", f"its split {split!r} holds no samples")
        return self.splits[split]

    @property
    def classes(self) -> tuple[str, ...]:
        """A name for each class, in the order of the labels; their numbers where none are known."""
        return self.class_names or tuple(map(str, range(self.num_classes)))

    @functools.cached_property
    def digest(self) -> str:
        """What tells these data from others, the same for every seed, see `digest_of`."""
        samples = self.source_digest or digest_of_array(self.samples)
        return digest_of(samples, self.classes, self.labels, self.splits["test"], self.groups)

    @property
    def is_text(self) -> bool:
        return self.samples.ndim == 2

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.samples.shape[1:]


def check_parts(
    name: str, count: int, labels: np.ndarray, num_classes: int, splits: dict[str, np.ndarray]
) -> None:
    """Checks labels and splits of `count` samples, byte images, token ids or texts.

    Raises:
      ValueError: a split is missing or points outside the data, or the labels do not fit.
    """
    missing = {"train", "validation", "distillation", "test"} - set(splits)
    if missing:
        raise ValueError(f"data set {name}: no split {sorted(missing)[0]!r}")
    if labels.dtype != np.int32:
        raise ValueError(f"data set {name}: labels must be int32, not {labels.dtype}")
    for split, positions in splits.items():
        # A device would clamp such positions silently.
        if len(positions) and not 0 <= positions.min() <= positions.max() < len(labels):
            raise ValueError(f"data set {name}: positions of {split} outside the data")
    if count != len(labels):
        raise ValueError(f"data set {name}: {count} samples, {len(labels)} labels")
    if not np.isin(labels, np.arange(num_classes)).all():
        raise ValueError(f"data set {name}: labels outside 0..{num_classes - 1}")


def digest_of(
    samples: str,
    classes: Sequence[str],
    labels: np.ndarray,
    test: np.ndarray,
    groups: np.ndarray | None = None,
) -> str:
    """SHA-256 of samples with their labels, names and owners, and of what is set aside for testing.

    A run's seed splits what is not tested on. That is no part of it, nor is how texts are cut into
    tokens: runs of several seeds and tokenizers are on the same data.

    Args:
      samples: SHA-256 of them.
      classes: names in the order of the labels.
      labels, test, groups: see `Dataset`.
    """
    digest = hashlib.sha256(json.dumps([samples, list(classes)]).encode())
    for array in (labels, test, *(() if groups is None else (groups,))):
        digest.update(digest_of_array(np.asarray(array, np.int64)).encode())
    return digest.hexdigest()


def digest_of_array(array: np.ndarray) -> str:
    """SHA-256 of an array's type, shape and values."""
    digest = hashlib.sha256(json.dumps([str(array.dtype), list(array.shape)]).encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def digest_of_texts(texts: Iterable[str]) -> str:
    """SHA-256 of texts, each with its length, so that none can take over a part of the next."""
    digest = hashlib.sha256()
    for text in texts:
        raw = text.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


def split_training(count: int, seed: int) -> dict[str, np.ndarray]:
    """Splits `count` official training samples at random.

    75% train, 15% validation, 10% kept for the data-dependent variant (ALGORITHM of the paper,
    section "data"); the official test set is not touched.
    """
    order = numpy_generator(seed, Stream.SPLIT).permutation(count).astype(np.int32)
    ends = np.cumsum(list(split_sizes(count).values()))
    return dict(zip(split_sizes(count), np.split(order, ends[:-1]), strict=True))


def split_sizes(count: int) -> dict[str, int]:
    """How many of `count` training samples each split gets."""
    train, validation = round(0.75 * count), round(0.15 * count)
    return {
        "train": train,
        "validation": validation,
        "distillation": count - train - validation,
    }


def official_splits(train: int, test: int, seed: int) -> dict[str, np.ndarray]:
    """Splits of data that hold `train` training samples, then `test` samples of a fixed test set.

    The training samples are split by `seed` as `split_training` does, the test set is as it came.
    """
    return {
        **split_training(train, seed),
        "test": np.arange(train, train + test, dtype=np.int32),
    }
