"""Reader of data sets that `experiments.prepare` wrote as ArrayRecord files through TFDS.

No TensorFlow comes into the process. Images are decoded here rather than by TFDS, and records are
fetched in blocks: twice as fast, and a damaged image is told by the name of its file.
"""

import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from fedrevive_jax.data.dataset import Dataset, DatasetSpec, Preprocessing, official_splits
from fedrevive_jax.data.errors import entries, reading
from fedrevive_jax.errors import ConfigError, FileError, one_line

_BLOCK = 1000  # records fetched in one call
_FEATURES = "tensorflow_datasets.core.features."


Samples = TypeVar("Samples", np.ndarray, list[str])


class Labelled(NamedTuple, Generic[Samples]):
    """Whole splits, one after the other.

    Attributes:
      samples: uint8 images [n, height, width, channels], or a list of n texts.
      labels: int32 array [n].
      groups: n owners of samples; empty where none were asked for.
      sizes: number of samples in each split.
    """

    samples: Samples
    labels: np.ndarray
    groups: list[str]
    sizes: list[int]


class Prepared(NamedTuple):
    """A prepared data set.

    Attributes:
      folder: the version folder with its files.
      builder: TFDS's view of it.
      again: what a message about damage ends with: how the data set is prepared anew.
    """

    folder: Path
    builder: Any
    again: str


def image_dataset(
    name: str,
    spec: DatasetSpec,
    class_names: tuple[str, ...],
    preprocessing: Preprocessing,
    data_dir: str,
    seed: int,
) -> Dataset:
    """An image data set with official `train` and `test` splits.

    Raises:
      ConfigError: it is not prepared in `data_dir`, damaged, or not what `spec` says.
    """
    prepared = find(name, data_dir)
    images, labels, _, sizes = read_images(prepared, ("train", "test"), spec)
    training, testing = sizes
    splits = official_splits(training, testing, seed)
    return Dataset(
        name,
        spec.num_classes,
        images,
        labels,
        splits,
        preprocessing,
        class_names=class_names,
    )


def command(name: str, data_dir: str) -> str:
    """The command that prepares a data set."""
    return f"python -m experiments.prepare --dataset={name} --data_dir={data_dir}"


def find(name: str, data_dir: str) -> Prepared:
    """The newest prepared version of a data set under `data_dir`/`name`.

    Raises:
      ConfigError: there is none, or what describes it cannot be read.
    """
    if not data_dir:
        raise ConfigError(
            "data_dir",
            "",
            f"must name the folder where {name} is prepared; to prepare it: "
            + command(name, "DIR"),
        )
    folders = version_folders(name, data_dir)
    if not folders:
        raise ConfigError(
            "data_dir",
            data_dir,
            f"{name} is not prepared there; to prepare it: " + command(name, data_dir),
        )
    folder = folders[-1]
    again = f"; remove {folder} and prepare it again: {command(name, data_dir)}"
    import tensorflow_datasets as tfds

    try:
        for name in _feature_classes(json.loads((folder / "features.json").read_bytes())):
            if not name.startswith(_FEATURES):
                raise FileError(
                    f"{folder}/features.json", f"names {name!r}; must be of {_FEATURES}*{again}"
                )
        builder = tfds.builder_from_directory(folder)
    except ConfigError:
        raise
    except Exception as error:  # whatever TFDS's readers of JSON and of features meet
        raise FileError(
            folder, f"dataset_info.json or features.json is damaged ({one_line(error)}){again}"
        ) from None
    told = builder.info.file_format
    file_format = told.value if told else "unknown"
    if file_format != "array_record":
        raise FileError(folder, f"holds {file_format} files, must be array_record{again}")
    return Prepared(folder, builder, again)


def _feature_classes(node: Any) -> Iterator[str]:
    """The classes that a features.json names. TFDS imports their modules, whichever they are."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if key in ("type", "pythonClassName", "python_class_name") and isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            yield from _feature_classes(value)


def version_folders(name: str, data_dir: str) -> list[Path]:
    """Folders of whole versions, oldest first; TFDS writes into folders with other names."""
    inside = entries(Path(data_dir).expanduser() / name)
    folders = [path for path in inside if re.fullmatch(r"\d+\.\d+\.\d+", path.name)]
    return sorted(folders, key=lambda path: tuple(map(int, path.name.split("."))))


def check_shards(prepared: Prepared, split: str) -> list[tuple[Path, int]]:
    """Files of a split with their numbers of records, each as many as were written.

    Raises:
      ConfigError: the split or a file is missing, empty, cut or not an ArrayRecord file.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    known = prepared.builder.info.splits
    if split not in known:
        raise FileError(
            prepared.folder,
            f"no split {split!r}, has {', '.join(known) or 'none'}" + prepared.again,
        )
    shards = [
        (Path(path), length)
        for path, length in zip(known[split].filepaths, known[split].shard_lengths, strict=True)
    ]
    if not shards:
        raise FileError(prepared.folder, f"split {split!r} is empty{prepared.again}")
    for path, length in shards:
        with reading(path):
            if not path.is_file():
                raise FileError(path, f"no such file{prepared.again}")
            path.open("rb").close()  # the reader of records would end the program
        found = ArrayRecordReader(str(path)).num_records()  # 0 where the file's end is damaged
        if found != length:
            raise FileError(
                path, f"damaged, {found} of {length} records can be read{prepared.again}"
            )
    return shards


def read_images(
    prepared: Prepared,
    splits: Sequence[str],
    spec: DatasetSpec,
    *,
    label: str = "label",
    group: str = "",
) -> Labelled[np.ndarray]:
    """Reads whole splits of images, with the features that hold their labels and owners.

    Raises:
      ConfigError: a split, file or feature is missing, damaged or not what `spec` says.
    """
    _check_features(prepared, ["image", label, *([group] if group else [])])
    stored = prepared.builder.info.features["image"].shape
    if stored != spec.input_shape:
        raise FileError(
            f"{prepared.folder}/features.json",
            f"images are {_by(stored)}, must be " + _by(spec.input_shape),
        )
    shards = [check_shards(prepared, split) for split in splits]
    sizes = [sum(length for _, length in files) for files in shards]
    images = np.empty((sum(sizes), *spec.input_shape), np.uint8)
    labels = np.empty(sum(sizes), np.int32)
    groups = []
    for row, (path, example) in enumerate(_examples(prepared, splits, shards)):
        images[row] = _decode(example["image"], path, spec.input_shape)
        labels[row] = _label(example[label], path, spec.num_classes)
        if group:
            groups.append(example[group].decode())
    return Labelled(images, labels, groups, sizes)


def read_texts(prepared: Prepared, splits: Sequence[str], num_classes: int) -> Labelled[list[str]]:
    """Reads whole splits of texts with their labels.

    Raises:
      ConfigError: a split, file or feature is missing or damaged, or a label is out of range.
    """
    _check_features(prepared, ["text", "label"])
    shards = [check_shards(prepared, split) for split in splits]
    texts, labels = [], []
    for path, example in _examples(prepared, splits, shards):
        texts.append(example["text"].decode())
        labels.append(_label(example["label"], path, num_classes))
    sizes = [sum(length for _, length in files) for files in shards]
    return Labelled(texts, np.asarray(labels, np.int32), [], sizes)


def _check_features(prepared: Prepared, names: Sequence[str]) -> None:
    known = prepared.builder.info.features
    for name in names:
        if name not in known:
            raise FileError(
                f"{prepared.folder}/features.json", f"no feature {name!r}, has {', '.join(known)}"
            )


def _examples(
    prepared: Prepared, splits: Sequence[str], shards: Sequence[list[tuple[Path, int]]]
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Examples in the order in which they are stored, each with its file; images stay encoded."""
    import tensorflow_datasets as tfds

    features = prepared.builder.info.features
    decoders = {"image": tfds.decode.SkipDecoding()} if "image" in features else None
    for split, files in zip(splits, shards, strict=True):
        source = prepared.builder.as_data_source(split, decoders=decoders)
        end = 0
        for path, length in files:
            start, end = end, end + length
            for first in range(start, end, _BLOCK):
                try:
                    block = source.__getitems__(range(first, min(first + _BLOCK, end)))
                except Exception as error:  # of ArrayRecord, of protocol buffers, of TFDS
                    raise FileError(path, f"damaged ({one_line(error)}){prepared.again}") from None
                for example in block:
                    yield path, example


def _decode(encoded: bytes, path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A byte image of that shape from an encoded one."""
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(encoded), formats=("PNG", "JPEG"))
        pixels = np.asarray(image)
    except Exception as error:  # Pillow's readers pass all kinds on
        raise FileError(path, f"an image cannot be decoded ({one_line(error)})") from None
    if image.mode not in ("L", "RGB"):  # numbers of a palette's colours look like grey
        raise FileError(path, f"an image's pixels are {image.mode}, must be L or RGB")
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.shape != shape or pixels.dtype != np.uint8:
        raise FileError(
            path, f"an image is {_by(pixels.shape)} {pixels.dtype}, must be {_by(shape)} uint8"
        )
    return pixels


def _label(label: Any, path: Path, num_classes: int) -> int:
    if not 0 <= label < num_classes:
        raise FileError(path, f"label {label}, must be in 0..{num_classes - 1}")
    return label


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
