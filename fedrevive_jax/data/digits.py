"""The 1,797 real handwritten 8x8 digits that scikit-learn carries; nothing is downloaded."""

import string

import numpy as np

from fedrevive_jax.data.dataset import Dataset, DatasetSpec, split_training

TEST_SAMPLES = 360
SPEC = DatasetSpec((8, 8, 1), 10, 1797 - TEST_SAMPLES, TEST_SAMPLES)
CLASS_NAMES = tuple(string.digits)


def load(data_dir: str, seed: int) -> Dataset:
    """Digits with a fixed stratified test split, the rest split by `seed`. `data_dir` is unused."""
    del data_dir
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    # The same test set whatever the seed, as for data sets that come with an official one.
    train, test = train_test_split(
        np.arange(len(labels)), test_size=TEST_SAMPLES, stratify=labels, random_state=0
    )
    order = np.concatenate([train, test])
    splits = split_training(len(train), seed)
    splits["test"] = np.arange(len(train), len(order), dtype=np.int32)
    return Dataset(
        "digits",
        SPEC.num_classes,
        images[order],
        labels[order].astype(np.int32),
        splits,
        class_names=CLASS_NAMES,
    )
