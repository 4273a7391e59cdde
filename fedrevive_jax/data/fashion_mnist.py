"""Fashion-MNIST from its four IDX files, as Debian's `dataset-fashion-mnist` installs them."""

import numpy as np

from fedrevive_jax.config import ConfigError
from fedrevive_jax.data.dataset import Dataset, DatasetSpec, split_training
from fedrevive_jax.data.idx import read_idx

SPEC = DatasetSpec((28, 28, 1), 10, 60_000)


def load(data_dir: str, seed: int) -> Dataset:
    """Reads the four files from `data_dir`; values stay in [0, 1], no augmentation."""
    if not data_dir:
        raise ConfigError(
            "--data_dir=: must name the folder with the Fashion-MNIST IDX files "
            "(Debian: dataset-fashion-mnist, /usr/share/datasets/fashion-mnist)"
        )
    images, labels = [], []
    for part in ("train", "t10k"):
        images.append(read_idx(data_dir, f"{part}-images-idx3-ubyte", 3))
        labels.append(read_idx(data_dir, f"{part}-labels-idx1-ubyte", 1))
        if len(images[-1]) != len(labels[-1]):
            raise ConfigError(
                f"--data_dir={data_dir}: {len(images[-1])} {part} images but "
                f"{len(labels[-1])} labels"
            )
        if images[-1].shape[1:] != (28, 28) or not len(labels[-1]) or labels[-1].max() > 9:
            raise ConfigError(
                f"--data_dir={data_dir}: the {part} files must hold 28x28 images, labels 0..9"
            )
    train = len(labels[0])
    splits = split_training(train, seed)
    splits["test"] = np.arange(train, train + len(labels[1]), dtype=np.int32)
    return Dataset(
        "fashion_mnist",
        SPEC.num_classes,
        np.concatenate(images)[..., None],
        np.concatenate(labels).astype(np.int32),
        splits,
    )
