"""CIFAR-10 as TFDS prepares it."""

from fedrevive_jax.data.dataset import Dataset, DatasetSpec, Preprocessing
from fedrevive_jax.data.tfds_reader import image_dataset

SPEC = DatasetSpec((32, 32, 3), 10, 50_000, 10_000)
CLASS_NAMES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
PREPROCESSING = Preprocessing(
    crop_padding=4, flip=True, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)
)


def load(data_dir: str, seed: int) -> Dataset:
    """Reads CIFAR-10; the official training images are split by `seed`."""
    return image_dataset("cifar10", SPEC, CLASS_NAMES, PREPROCESSING, data_dir, seed)
