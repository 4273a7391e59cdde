"""A user's own images, in folders named after their classes.

DIR/PART/class/file with the parts train, test and maybe validation, or DIR/class/file, of which a
fixed fifth of every class is then the test split. Any of `pixels.FORMATS`, 8 bits a channel, one
size.
"""

from pathlib import Path

import numpy as np

from fedrevive_jax.data import folders, pixels
from fedrevive_jax.data.dataset import Dataset
from fedrevive_jax.errors import FileError


def load(data_dir: str, seed: int) -> Dataset:
    """Reads the images as a viewer shows them; values stay in [0, 1], no augmentation.

    Images have one channel if all are grey, else three. Transparent ones are put on white.

    Raises:
      ConfigError: the layout is wrong, or an image cannot be read, is not shown in one way only or
        has a size of its own.
    """
    folder = folders.root(data_dir, "folders of images, one for each class")
    arranged = folders.arrange(folder, folders.class_files(folder), seed)
    return Dataset(
        "image_folder",
        len(arranged.class_names),
        _images([Path(item.content) for item in arranged.items]),
        arranged.labels,
        arranged.splits,
        class_names=arranged.class_names,
    )


def _images(files: list[Path]) -> np.ndarray:
    """uint8 [n, height, width, channels]."""
    first = pixels.read(files[0])
    images: np.ndarray = np.empty((len(files), *first.shape), np.uint8)
    for number, file in enumerate(files):
        image = pixels.read(file)
        if image.shape[:2] != first.shape[:2]:
            raise FileError(file, f"is {_by(image)} pixels, must be {_by(first)} as {files[0]}")
        if image.shape[-1] > images.shape[-1]:  # the first in colour
            images = images.repeat(3, axis=3)
        images[number] = image
    return images


def _by(image: np.ndarray) -> str:
    height, width, _ = image.shape
    return f"{width}x{height}"
