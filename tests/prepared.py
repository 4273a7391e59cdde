"""Writes small data sets as `experiments.prepare` would, without TensorFlow and without network.

The images and texts are made up, but can be learnt: a class has a pattern, or words, of its own.
cifar10, cifar100 and fashion_mnist are written with the features and the writing code of TFDS's
own builders; femnist and newsgroups go through the project's builders, from made-up raw files.
"""

import io
import json
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from experiments.prepare import prepare
from fedrevive_jax.data import newsgroups
from fedrevive_jax.data.builders.newsgroups import ARCHIVE, FOLDERS

NAMES = ("cifar10", "cifar100", "fashion_mnist", "femnist", "newsgroups")


def write(
    name: str, data_dir: str | Path, *, train: int = 200, test: int = 100, writers: int = 12
) -> None:
    """Prepares a small data set under `data_dir`, the same at every call.

    Args:
      name: one of `NAMES`.
      data_dir: the folder for `--data_dir`.
      train, test: samples of the splits; FEMNIST, which has no test split, gets their sum.
      writers: FEMNIST's writers, who have uneven numbers of samples.
    """
    if name in ("femnist", "newsgroups"):
        with tempfile.TemporaryDirectory() as raw:
            if name == "femnist":
                write_parquet(Path(raw, "train.parquet"), femnist_rows(train + test, writers))
            else:
                write_archive(Path(raw, ARCHIVE), train=train, test=test)
            prepare(name, str(data_dir), raw)
    else:
        write_images(name, data_dir, {"train": train, "test": test})


def images(labels: np.ndarray, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """uint8 images [n, *shape]: a coarse pattern for each class, under noise."""
    height, width, channels = shape
    coarse = np.random.default_rng(1).uniform(0, 255, (max(labels) + 1, 4, 4, channels))
    patterns = coarse.repeat(height // 4, axis=1).repeat(width // 4, axis=2)
    noise = np.random.default_rng(seed).normal(0, 20, (len(labels), *shape))
    return np.clip(patterns[labels] + noise, 0, 255).astype(np.uint8)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image.squeeze()).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(
    name: str,
    data_dir: str | Path,
    sizes: dict[str, int],
    *,
    features: dict | None = None,
    encode: Callable[[np.ndarray], bytes] = png,
    num_shards: int = 1,
) -> Path:
    """A data set with the features of TFDS's builder, or with others; returns its folder.

    Labels run through the classes that the features know, again and again.
    """
    original = tfds.builder_cls(name)

    class Small(original, skip_registration=True):
        VERSION = original.VERSION

        def _info(self):
            if features is None:
                return super()._info()
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split, n) for split, n in sizes.items()}

        def _generate_examples(self, split, count):
            known = self.info.features
            labels = np.arange(count) % known["label"].num_classes
            pixels = images(labels, known["image"].shape, seed=len(split))
            for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
                example = {"image": io.BytesIO(encode(image)), "label": int(label)}
                others = {"id": "0", "coarse_label": 0}
                yield number, example | {key: others[key] for key in others if key in known}

    Small.name = name
    tfds.disable_progress_bar()
    builder = Small(data_dir=data_dir, file_format="array_record")
    config = tfds.download.DownloadConfig(num_shards=num_shards)
    builder.download_and_prepare(download_config=config)
    return Path(builder.data_dir)


def femnist_rows(count: int, writers: int) -> dict[str, list]:
    """Columns of flwrlabs/femnist: writer w has about w + 1 times the samples of writer 0."""
    labels = np.arange(count) % 62
    shares = np.cumsum(np.arange(1, writers + 1)) / (writers * (writers + 1) / 2)
    owners = np.searchsorted(shares, (np.arange(count) + 0.5) / count)
    return {
        "image": [{"bytes": png(x), "path": None} for x in images(labels, (28, 28, 1))],
        "writer_id": [f"f{owner:04}_00" for owner in owners],
        "hsf_id": [0] * count,
        "character": labels.tolist(),
    }


def write_parquet(path: Path, columns: dict[str, list]) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)


def write_leaf(path: Path, writers: dict[str, list[int]]) -> None:
    """LEAF's JSON: the classes that each writer wrote, pixels to four digits."""
    data = {
        writer: {
            "x": [
                (x.reshape(-1) / 255).round(4).tolist()
                for x in images(np.asarray(labels), (28, 28, 1))
            ]
            if labels
            else [],
            "y": labels,
        }
        for writer, labels in writers.items()
    }
    sizes = [len(labels) for labels in writers.values()]
    path.write_text(json.dumps({"users": list(writers), "num_samples": sizes, "user_data": data}))


def post(label: int, number: int) -> str:
    """A post with all that is to be removed, around words of its class."""
    words = np.random.default_rng([label, number]).choice(8, 12)
    body = " ".join(f"the topic{label}word{word}" for word in words)
    return (
        f"From: someone@example.org\nSubject: {number}\n\n"
        f"Someone writes:\n> quoted words\n{body}\n\n--\nsignature\n"
    )


def write_archive(
    path: Path, *, train: int, test: int, more: dict[str, bytes] | None = None
) -> None:
    """An archive laid out as 20news-bydate, and more files of that name and content."""
    files = dict(more or {})
    for split, count in (("train", train), ("test", test)):
        for number in range(count):
            label = number % 20
            name = f"{FOLDERS[split]}/{newsgroups.CLASS_NAMES[label]}/{number}"
            files[name] = post(label, number).encode("latin-1")
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, raw in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
