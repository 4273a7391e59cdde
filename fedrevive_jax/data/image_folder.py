"""A user's own images, in folders named after their classes.

Either DIR/train/class/file and DIR/test/class/file, or DIR/class/file, of which a fixed fifth of
every class is then the test split. Any of `FORMATS`, 8 bits a channel, one size.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from fedrevive_jax.data import folders
from fedrevive_jax.data.dataset import Dataset
from fedrevive_jax.data.errors import one_line
from fedrevive_jax.errors import FileError

# Pillow reads more, but hands some of it to other programs to be run (EPS).
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
_GRAY = ("1", "L", "LA")
_COLOUR = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")


def load(data_dir: str, seed: int) -> Dataset:
    """Reads the images; values stay in [0, 1], no augmentation.

    Images have one channel if all are grey, else three; transparency is dropped.

    Raises:
      ConfigError: the layout is wrong, or an image cannot be read or has a size of its own.
    """
    folder = folders.root(data_dir, "folders of images, one for each class")
    arranged = folders.arrange(folder, folders.class_files(folder), seed)
    files = [Path(item.content) for item in arranged.items]
    mode, (width, height) = _common_format(files)
    images = np.empty((len(files), height, width, len(mode)), np.uint8)
    for image, file in zip(images, files, strict=True):
        image[:] = _pixels(file, mode).reshape(image.shape)
    return Dataset(
        "image_folder",
        len(arranged.class_names),
        images,
        arranged.labels,
        arranged.splits,
        class_names=arranged.class_names,
    )


def _common_format(files: list[Path]) -> tuple[str, tuple[int, int]]:
    """L or RGB, and (width, height), from the headers of all images."""
    mode, size = "L", None
    for file in files:
        with _open(file) as image:
            if image.mode not in _GRAY + _COLOUR:
                raise FileError(file, f"pixels are {image.mode}, must be 8 bits a channel")
            if image.mode not in _GRAY:
                mode = "RGB"
            size = size or image.size
            if image.size != size:
                raise FileError(
                    file, f"is {_by(image.size)} pixels, must be {_by(size)} as {files[0]}"
                )
    return mode, size


def _pixels(file: Path, mode: str) -> np.ndarray:
    with _open(file) as image:
        try:
            return np.asarray(image.convert(mode))
        except Exception as error:  # Pillow's readers pass all kinds on
            raise FileError(file, f"cannot be read as an image ({one_line(error)})") from None


def _open(file: Path) -> Image.Image:
    if not file.is_file():  # a pipe would be waited for
        raise FileError(file, "cannot be read as an image (it is no file)")
    try:
        return Image.open(file, formats=FORMATS)
    except Exception as error:  # as above
        raise FileError(file, f"cannot be read as an image ({one_line(error)})") from None


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
