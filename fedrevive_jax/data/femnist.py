"""FEMNIST: handwritten digits and letters with the writer of each, one client a writer.

Prepared by the project's own TFDS builder, `fedrevive_jax.data.builders.femnist`.
"""

import string

import numpy as np

from fedrevive_jax.compute.streams import Stream, numpy_generator
from fedrevive_jax.data.dataset import Dataset, DatasetSpec
from fedrevive_jax.data.tfds_reader import find, read_images

# The classes in the order of their labels, in LEAF as in flwrlabs/femnist.
CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
# All 814,277 samples of flwrlabs/femnist: FEMNIST has no official test set. A tenth of them is
# kept for distillation, as a tenth of the training samples is elsewhere.
SPEC = DatasetSpec((28, 28, 1), len(CHARACTERS), 814_277)
SHARES = {"train": 0.6, "validation": 0.15, "test": 0.15, "distillation": 0.1}
TEST_SEED = 0


def load(data_dir: str, seed: int) -> Dataset:
    """Reads FEMNIST; `groups` are the writers, values stay in [0, 1], no augmentation."""
    prepared = find("femnist", data_dir)
    stored = read_images(prepared, ("train",), SPEC, label="character", group="writer_id")
    _, writers = np.unique(stored.groups, return_inverse=True)
    return Dataset(
        "femnist",
        SPEC.num_classes,
        stored.samples,
        stored.labels,
        split_writers(writers, seed),
        groups=writers.astype(np.int32),
        class_names=tuple(CHARACTERS),
    )


def split_writers(writers: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Splits the samples of each writer at random by `SHARES`.

    The test part is the same for every seed, as an official test set would be: what one seed tunes
    or trains on, another must not be tested on.

    The ends of a writer's parts are rounded, not their sizes, so that the parts of a writer with
    few samples add up; 0.6 rounds up, so that each writer has a training sample.

    Args:
      writers: int array [n], the writer of each sample, 0 ... W-1, each with a sample.
      seed: seed of the split of all but the test part.

    Returns:
      int32 positions of each split, ascending.
    """
    sizes = np.bincount(writers)
    ends = [np.round(share * sizes) for share in np.cumsum(list(SHARES.values()))]
    counts = dict(zip(SHARES, np.diff(ends, axis=0, prepend=0), strict=True))
    tested = _places(writers, TEST_SEED) < counts["test"][writers]
    splits, others = {"test": np.flatnonzero(tested)}, np.flatnonzero(~tested)
    of_writer, start = writers[others], np.zeros(len(sizes))
    place = _places(of_writer, seed)
    for name in ("train", "validation", "distillation"):
        end = start + counts[name]
        splits[name] = others[(place >= start[of_writer]) & (place < end[of_writer])]
        start = end
    return {name: splits[name].astype(np.int32) for name in SHARES}


def _places(writers: np.ndarray, seed: int) -> np.ndarray:
    """Of each sample its place, from 0, in a random order of its writer's samples."""
    sizes = np.bincount(writers)
    order = numpy_generator(seed, Stream.SPLIT).permutation(len(writers))
    order = order[np.argsort(writers[order], kind="stable")]  # writer by writer
    places = np.empty(len(writers), np.int64)
    places[order] = np.arange(len(writers)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return places
