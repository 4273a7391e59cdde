"""The record of a data set, and the split of its training part."""

import functools
import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from fedrevive_jax.compute.streams import Stream, numpy_generator
from fedrevive_jax.data.tokens import Tokenizer
from fedrevive_jax.errors import ConfigError, FileError

_LOG = logging.getLogger(__name__)
SHOWN = 10  # names of classes in a warning


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
      test_samples: official test samples beside them; 0 where the test part is one of those.
    """

    input_shape: tuple[int, ...]
    num_classes: int
    training_samples: int
    test_samples: int = 0


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
        check_samples(self)
        check_parts(
            self.name,
            len(self.samples),
            self.labels,
            self.num_classes,
            self.splits,
            self.class_names,
        )

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


def warn_of_missing_classes(dataset: Dataset) -> None:
    """Warns of classes that nothing is trained on, and of those that nothing is tested on."""
    for split, consequence in (("train", "none can be learnt"), ("test", "none is tested")):
        held = np.bincount(dataset.labels[dataset.splits[split]], minlength=dataset.num_classes)
        missing = [name for name, count in zip(dataset.classes, held, strict=True) if not count]
        if missing:
            shown = ", ".join(map(repr, missing[:SHOWN])) + (", ..." if missing[SHOWN:] else "")
            _LOG.warning(
                "data set %s: %d of %d classes without a sample in the split %r (%s); %s",
                dataset.name, len(missing), len(held), split, shown, consequence,
            )  # fmt: skip


def check_samples(dataset: Dataset) -> None:
    """Checks the samples of a data set, their owners, and how they become inputs.

    Raises:
      FileError: they are not what a `Dataset` holds.
    """

    def refuse(reason: str) -> None:
        raise FileError(f"data set {dataset.name}", reason)

    samples, groups = dataset.samples, dataset.groups
    kinds = ((np.uint8, 4), (np.int32, 2))
    if (getattr(samples, "dtype", None), getattr(samples, "ndim", None)) not in kinds:
        refuse(
            "samples must be uint8 [n, height, width, channels] or int32 [n, length]; are "
            f"{_told(samples)}"
        )
    if dataset.is_text and samples.size and samples.min() < 0:
        refuse(f"token ids must be at least 0; one is {samples.min()}")
    if groups is not None and not _is_whole(groups, (len(samples),)):
        refuse(f"groups must be whole numbers [{len(samples)}]; are {_told(groups)}")
    mean, std = dataset.preprocessing.mean, dataset.preprocessing.std
    if dataset.is_text or not (mean or std):
        return
    for name, own in (("mean", mean), ("std", std)):
        if len(own) != samples.shape[-1]:
            refuse(
                f"mean and std must have {samples.shape[-1]} numbers, a channel each; "
                f"{name} has {len(own)}"
            )
    if not np.isfinite((*mean, *std)).all() or min(std) <= 0:
        refuse(f"mean and std must be finite, and std above 0; are {mean} and {std}")


def check_parts(
    name: str,
    count: int,
    labels: np.ndarray,
    num_classes: int,
    splits: dict[str, np.ndarray],
    class_names: Sequence[str] = (),
) -> None:
    """Checks labels and splits of `count` samples, byte images, token ids or texts.

    Raises:
      FileError: a split is missing, points outside the data or shares samples with one that it must
        not, or the labels or the names do not fit.
    """

    def refuse(reason: str) -> None:
        raise FileError(f"data set {name}", reason)

    wanted = ("train", "validation", "distillation", "test")
    if not isinstance(splits, dict):
        refuse(f"splits must be a dict of {', '.join(wanted)}; is {_told(splits)}")
    missing = [split for split in wanted if split not in splits]
    if missing:
        refuse(f"no split {missing[0]!r}; there must be {', '.join(wanted)}")
    if getattr(labels, "dtype", None) != np.int32 or labels.ndim != 1:
        refuse(f"labels must be int32 [n], the number of each sample's class; are {_told(labels)}")
    if count != len(labels):
        refuse(f"{count} samples, {len(labels)} labels")
    if not _is_whole(np.asarray(num_classes), ()) or num_classes < 1:
        refuse(f"num_classes must be a whole number of at least 1; is {num_classes}")
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if len(outside):
        refuse(f"labels outside 0..{num_classes - 1}; one is {outside[0]}")
    for split, positions in splits.items():
        if not _is_whole(positions, (np.size(positions),)):
            refuse(
                f"split {split!r} must be whole numbers [m], positions of samples; is "
                f"{_told(positions)}"
                + ("; np.flatnonzero gives them" if _told(positions).startswith("bool") else "")
            )
        # A device would clamp such positions silently.
        if len(positions) and not 0 <= positions.min() <= positions.max() < count:
            refuse(f"positions of {split} outside the data, which are 0..{count - 1}")
    for held_out, seen in (("test", "train"), ("test", "distillation"), ("validation", "train")):
        shared = np.intersect1d(splits[held_out], splits[seen])
        if len(shared):
            refuse(
                f"{len(shared)} samples of {held_out} are in {seen}, too, such as {shared[0]}; "
                "no sample may be in both"
            )
    if class_names and len(class_names) != num_classes:
        refuse(f"class_names must be {num_classes} names, one a class; are {len(class_names)}")
    for own in class_names:
        if not isinstance(own, str):
            refuse(f"class_names must be texts; one is {own!r}")
        if any("\ud800" <= c <= "\udfff" for c in own):
            refuse(
                f"the name of class {own!a} cannot be read in this locale; PYTHONUTF8=1 reads "
                "file names as UTF-8"
            )


def _is_whole(value: Any, shape: tuple[int, ...]) -> bool:
    """Whether it is an array of whole numbers of this shape."""
    return (
        isinstance(getattr(value, "dtype", None), np.dtype)
        and np.issubdtype(value.dtype, np.integer)
        and value.shape == shape
    )


def _told(value: Any) -> str:
    """What a value is, in a message."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype} {list(value.shape)}"
    return f"a {type(value).__name__}"


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


def split_training(
    count: int, seed: int, labels: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Splits `count` official training samples at random.

    75% train, 15% validation, 10% kept for the data-dependent variant, as arXiv 2511.00655 does;
    the official test set is not touched.

    Args:
      count: n.
      seed: seed of the split.
      labels: int array [n]; each split gets its share of every class then, so that a rare class is
        missing in none that has a place for it. The paper's splits do not look at labels.

    Returns:
      int32 positions of each split, by name.
    """
    if labels is not None:
        return split_by_class(labels, split_sizes(count), seed)
    order = numpy_generator(seed, Stream.SPLIT).permutation(count).astype(np.int32)
    ends = np.cumsum(list(split_sizes(count).values()))
    return dict(zip(split_sizes(count), np.split(order, ends[:-1]), strict=True))


def split_by_class(labels: np.ndarray, sizes: dict[str, int], seed: int) -> dict[str, np.ndarray]:
    """Splits samples at random so that each split has its share of every class.

    The samples of a class are spread evenly over the line of all samples, which is then cut. The
    first of every class come first: where the first split has a place for each class, none is
    missing there.

    Args:
      labels: int array [n].
      sizes: samples of each split, n together.
      seed: seed of the split.

    Returns:
      int32 positions of each split, ascending.
    """
    generator = numpy_generator(seed, Stream.SPLIT)
    share = places(labels, generator) / np.bincount(labels)[labels]
    line = np.lexsort((generator.permutation(len(labels)), share)).astype(np.int32)
    parts = np.split(line, np.cumsum(list(sizes.values()))[:-1])
    return {name: np.sort(part) for name, part in zip(sizes, parts, strict=True)}


def places(groups: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Of each sample its place, from 0, in a random order of its group's samples.

    Args:
      groups: int array [n], the group of each sample, from 0.
      generator: a permutation of n is drawn from it.
    """
    sizes = np.bincount(groups)
    order = generator.permutation(len(groups))
    order = order[np.argsort(groups[order], kind="stable")]  # group by group
    found = np.empty(len(groups), np.int64)
    found[order] = np.arange(len(groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return found


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
