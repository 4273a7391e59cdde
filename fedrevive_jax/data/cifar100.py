"""CIFAR-100 with its fine labels as TFDS prepares it."""

from fedrevive_jax.data.dataset import Dataset, DatasetSpec, Preprocessing
from fedrevive_jax.data.tfds_reader import image_dataset

SPEC = DatasetSpec((32, 32, 3), 100, 50_000)
PREPROCESSING = Preprocessing(
    crop_padding=4,
    flip=True,
    rotation=15.0,
    mean=(0.507, 0.487, 0.441),
    std=(0.268, 0.257, 0.276),
)


def load(data_dir: str, seed: int) -> Dataset:
    """Reads CIFAR-100; the official training images are split by `seed`."""
    return image_dataset("cifar100", SPEC, PREPROCESSING, data_dir, seed)
