"""FEMNIST: handwritten digits and letters with the writer of each, one client a writer.

Prepared by the project's own TFDS builder, `fedrevive_jax.data.builders.femnist`.
"""

import string

import numpy as np

from fedrevive_jax.compute.streams import Stream, numpy_generator
from fedrevive_jax.data.dataset import Dataset, DatasetSpec, places
from fedrevive_jax.data.names import ordered
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
    numbers = {writer: number for number, writer in enumerate(ordered(stored.groups))}
    writers = np.asarray([numbers[writer] for writer in stored.groups], np.int32)
    return Dataset(
        "femnist",
        SPEC.num_classes,
        stored.samples,
        stored.labels,
        split_writers(writers, seed),
        groups=writers,
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
    tested = places(writers, numpy_generator(TEST_SEED, Stream.SPLIT)) < counts["test"][writers]
    splits, others = {"test": np.flatnonzero(tested)}, np.flatnonzero(~tested)
    of_writer, start = writers[others], np.zeros(len(sizes))
    place = places(of_writer, numpy_generator(seed, Stream.SPLIT))
    for name in ("train", "validation", "distillation"):
        end = start + counts[name]
        splits[name] = others[(place >= start[of_writer]) & (place < end[of_writer])]
        start = end
    return {name: splits[name].astype(np.int32) for name in SHARES}
