"""Fashion-MNIST from its four IDX files, as Debian installs them, or as TFDS prepares it."""

from pathlib import Path

import numpy as np

from fedrevive_jax.data.dataset import Dataset, DatasetSpec, Preprocessing, official_splits
from fedrevive_jax.data.errors import entries
from fedrevive_jax.data.idx import read_idx
from fedrevive_jax.data.tfds_reader import command, image_dataset, version_folders
from fedrevive_jax.errors import ConfigError

SPEC = DatasetSpec((28, 28, 1), 10, 60_000, 10_000)
CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def load(data_dir: str, seed: int) -> Dataset:
    """Reads the IDX files if `data_dir` holds any, else what TFDS prepared there.

    Values stay in [0, 1], no augmentation.
    """
    if not data_dir:
        raise ConfigError(
            "data_dir",
            "",
            "must name the folder with the Fashion-MNIST IDX files "
            "(Debian: dataset-fashion-mnist, /usr/share/datasets/fashion-mnist), or that of "
            + command("fashion_mnist", "DIR"),
        )
    if any(path.match("*-idx?-ubyte*") for path in entries(Path(data_dir).expanduser())):
        return _from_idx(data_dir, seed)
    if version_folders("fashion_mnist", data_dir):
        return image_dataset("fashion_mnist", SPEC, CLASS_NAMES, Preprocessing(), data_dir, seed)
    raise ConfigError(
        "data_dir",
        data_dir,
        f"no file train-images-idx3-ubyte or its .gz there, nor is "
        f"fashion_mnist prepared there; to prepare it: {command('fashion_mnist', data_dir)}",
    )


def _from_idx(data_dir: str, seed: int) -> Dataset:
    images, labels = [], []
    for part in ("train", "t10k"):
        images.append(read_idx(data_dir, f"{part}-images-idx3-ubyte", 3))
        labels.append(read_idx(data_dir, f"{part}-labels-idx1-ubyte", 1))
        if len(images[-1]) != len(labels[-1]):
            raise ConfigError(
                "data_dir",
                data_dir,
                f"{len(images[-1])} {part} images but {len(labels[-1])} labels",
            )
        if images[-1].shape[1:] != (28, 28) or not len(labels[-1]) or labels[-1].max() > 9:
            raise ConfigError(
                "data_dir", data_dir, f"the {part} files must hold 28x28 images, labels 0..9"
            )
    training, testing = map(len, labels)
    return Dataset(
        "fashion_mnist",
        SPEC.num_classes,
        np.concatenate(images)[..., None],
        np.concatenate(labels).astype(np.int32),
        official_splits(training, testing, seed),
        class_names=CLASS_NAMES,
    )
