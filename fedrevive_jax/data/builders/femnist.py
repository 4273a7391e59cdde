"""FEMNIST as a TFDS data set, from flwrlabs/femnist's parquet files or from LEAF's JSON."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from fedrevive_jax.data import pixels
from fedrevive_jax.data.builders import manual_folder
from fedrevive_jax.data.errors import entries
from fedrevive_jax.data.femnist import CHARACTERS
from fedrevive_jax.errors import ConfigError, FileError, one_line

# A fixed revision: the address always gives the same bytes.
URL = (
    "https://huggingface.co/datasets/flwrlabs/femnist/resolve/"
    "df739a2b09df2b5cc1ec93107659b9a9a8566487/data/train-00000-of-00001.parquet"
)
SIDE = 28
# Not all that Pillow reads: some formats are programs that it hands to other programs.
FORMATS = ("PNG", "JPEG", "BMP")
UNKNOWN_HSF = -1


class Row(NamedTuple):
    """A sample: an image as a PNG file, its writer, its form's partition and its class."""

    png: bytes
    writer: str
    hsf: int
    label: int


class Femnist(tfds.core.GeneratorBasedBuilder):
    """Federated Extended MNIST: 62 classes of handwritten characters, with their writers."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "The parquet files of https://huggingface.co/datasets/flwrlabs/femnist (folder data), or "
        "LEAF's JSON files (https://leaf.cmu.edu, data/femnist/data/all_data; or the folders train "
        "and test of a split by samples)."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="28x28 images of handwritten digits and letters with their writers; white "
            "is 255. hsf_id is -1 where the source does not give it.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIDE, SIDE, 1)),
                    "writer_id": tfds.features.Text(),
                    "hsf_id": tfds.features.Scalar(np.int64),
                    "character": tfds.features.ClassLabel(names=list(CHARACTERS)),
                }
            ),
            supervised_keys=("image", "character"),
            homepage="https://leaf.cmu.edu",
        )

    def _split_generators(self, dl_manager):
        folder = manual_folder(dl_manager)
        if folder is None:
            rows = parquet_rows(Path(dl_manager.download(URL)))
        else:
            rows = manual_rows(folder)
        return {"train": self._generate_examples(rows)}

    def _generate_examples(self, rows):
        # Keyed by number: the order in which samples are stored depends on the keys, and shall not
        # depend on where the files lie.
        for number, row in enumerate(rows):
            yield (
                number,
                {
                    "image": io.BytesIO(row.png),
                    "writer_id": row.writer,
                    "hsf_id": row.hsf,
                    "character": row.label,
                },
            )


def manual_rows(folder: Path) -> Iterator[Row]:
    """Samples from the files that a user has.

    Raises:
      ConfigError: there are none, or they cannot be read.
    """

    def files(suffix: str, *parts: str) -> list[Path]:
        inside = [path for part in ("", *parts) for path in entries(folder / part)]
        return sorted(path for path in inside if path.suffix == suffix)

    parquet, leaf = files(".parquet", "data"), files(".json", "train", "test")
    if not parquet and not leaf:
        raise ConfigError(
            "manual_dir", folder, "no .parquet files of flwrlabs/femnist, no .json files of LEAF"
        )
    for path in parquet or leaf:
        yield from parquet_rows(path) if parquet else leaf_rows(path)


def parquet_rows(path: Path) -> Iterator[Row]:
    """Samples of a file with the columns image, writer_id, character and maybe hsf_id.

    Raises:
      ConfigError: the file is cut or lacks a column, or a sample is not what it should be.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise FileError(path, "to read it, pip install -e '.[tfds]' (pyarrow)") from None
    try:
        file = parquet.ParquetFile(path)
        known = file.schema_arrow.names
        for column in ("image", "writer_id", "character"):
            if column not in known:
                raise FileError(path, f"no column {column!r}, has {', '.join(known)}")
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield _parquet_row(row, f"{path} row {number}")
                number += 1
    except (OSError, pyarrow.ArrowException) as error:
        raise FileError(
            path,
            f"cannot be read as parquet ({one_line(error)}); if it was downloaded, remove "
            "it and try again",
        ) from None


def leaf_rows(path: Path) -> Iterator[Row]:
    """Samples of a JSON file of LEAF: users, and user_data with lists x of 784 floats, classes y.

    Raises:
      ConfigError: the file is cut, or a writer has no samples or wrong ones.
    """
    try:
        content = json.loads(path.read_bytes())
        writers = {user: content["user_data"][user] for user in content["users"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FileError(path, f"cannot be read as LEAF's JSON ({one_line(error)})") from None
    for writer, data in writers.items():
        where = f"{path} writer {writer!r}"
        try:
            images, labels = np.asarray(data["x"], np.float64), list(data["y"])
        except (ValueError, KeyError, TypeError) as error:
            raise FileError(where, f"must have x and y ({one_line(error)})") from None
        if not labels:
            raise FileError(where, "has no samples")
        if images.shape != (len(labels), SIDE * SIDE) or not ((images >= 0) & (images <= 1)).all():
            raise FileError(
                where, f"x must be {len(labels)} lists of {SIDE * SIDE} numbers in 0..1"
            )
        pixels = np.round(images * 255).astype(np.uint8).reshape(-1, SIDE, SIDE)
        for image, label in zip(pixels, labels, strict=True):
            yield _row(_png(Image.fromarray(image)), writer, UNKNOWN_HSF, label, where)


def _parquet_row(row: dict[str, Any], where: str) -> Row:
    """`image` is a struct with the bytes of an encoded image."""
    try:
        raw = row["image"]["bytes"]
        image = Image.open(io.BytesIO(raw), formats=FORMATS)
        shown = pixels.as_shown(image)
    except pixels.NotShown as error:
        raise FileError(where, f"image {error}") from None
    except Exception as error:  # Pillow's readers pass all kinds on
        raise FileError(where, f"image cannot be decoded ({one_line(error)})") from None
    if shown.size != (SIDE, SIDE):
        raise FileError(
            where, f"image is {shown.width}x{shown.height} pixels, must be {SIDE}x{SIDE}"
        )
    if (image.format, image.mode) != ("PNG", "L") or shown.tobytes() != image.tobytes():
        raw = _png(shown.convert("L"))
    return _row(raw, row["writer_id"], row.get("hsf_id", UNKNOWN_HSF), row["character"], where)


def _row(png: bytes, writer: Any, hsf: int, label: Any, where: str) -> Row:
    if not isinstance(writer, str) or not writer:
        raise FileError(where, f"writer_id is {writer!r}, must name a writer")
    if not isinstance(label, int) or not 0 <= label < len(CHARACTERS):
        raise FileError(where, f"label {label!r}, must be in 0..{len(CHARACTERS) - 1}")
    return Row(png, writer, hsf, label)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
