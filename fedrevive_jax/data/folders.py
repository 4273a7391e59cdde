"""A user's own data: folders named after classes, and a test split where the user made none."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedrevive_jax.data.dataset import official_splits
from fedrevive_jax.errors import ConfigError, FileError

TEST_SHARE = 0.2


class Item(NamedTuple):
    """A sample of the user's.

    Attributes:
      where: its file, and line where a file holds many; for messages.
      class_name: the class that the user gave it.
      content: the path of its file, or its text.
    """

    where: str
    class_name: str
    content: Path | str


class Arranged(NamedTuple):
    """Samples in the order in which a data set holds them.

    Attributes:
      class_names: in alphabetical order, the order of the labels.
      items: training samples, then test samples.
      labels: int32 array [n].
      splits: positions of each split.
    """

    class_names: tuple[str, ...]
    items: list[Item]
    labels: np.ndarray
    splits: dict[str, np.ndarray]


def root(data_dir: str, what: str) -> Path:
    """The folder that `data_dir` names.

    Raises:
      ConfigError: it names none, or what is no folder.
    """
    if not data_dir:
        raise ConfigError("data_dir", "", f"must name the folder with {what}")
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise ConfigError("data_dir", data_dir, "no such folder")
    return folder


def class_files(folder: Path) -> tuple[list[Item], list[Item] | None]:
    """The training and the test files under `folder`; the latter None where there is no `test`.

    The layout is `train`/class/file with `test`/class/file, or class/file for both together.
    Hidden files and files beside class folders are no data.

    Raises:
      ConfigError: `train` or `test` comes alone, there is no class, or one has no files.
    """
    train, test = folder / "train", folder / "test"
    if not train.is_dir() and not test.is_dir():
        return _class_folders(folder), None
    for part, other in ((train, test), (test, train)):
        if not part.is_dir():
            raise FileError(folder, f"has a folder {other.name!r} but no folder {part.name!r}")
    return _class_folders(train), _class_folders(test)


def arrange(folder: Path, train: list[Item], test: list[Item] | None, seed: int) -> Arranged:
    """Numbers the classes and makes the splits; without a test part one is set aside.

    Raises:
      ConfigError: there are fewer than two classes, a test sample's class has no training sample,
        or there is nothing to set aside.
    """
    class_names = tuple(sorted({item.class_name for item in train}))
    if len(class_names) < 2:
        raise FileError(folder, f"holds the classes {list(class_names)}, must hold two or more")
    if test is None:
        train, test = _set_aside(folder, train)
    numbers = {name: number for number, name in enumerate(class_names)}
    for item in test:
        if item.class_name not in numbers:
            raise FileError(item.where, f"class {item.class_name!r} has no training sample")
    items = [*train, *test]
    labels = np.asarray([numbers[item.class_name] for item in items], np.int32)
    return Arranged(class_names, items, labels, official_splits(len(train), len(test), seed))


def visible(folder: Path) -> list[Path]:
    """What a folder holds, sorted by name, without hidden entries."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _class_folders(folder: Path) -> list[Item]:
    classes = [path for path in visible(folder) if path.is_dir()]
    if not classes:
        raise FileError(folder, "holds no folders, must hold one for each class")
    items = []
    for path in classes:
        files = visible(path)
        if not files:
            raise FileError(path, f"holds no files, must hold samples of class {path.name!r}")
        items += [Item(str(file), path.name, file) for file in files]
    return items


def _set_aside(folder: Path, items: list[Item]) -> tuple[list[Item], list[Item]]:
    """A fifth of every class as a test split, the same whatever the seed of a run.

    A class of one or two samples stays in the training split as a whole.
    """
    generator = np.random.default_rng(0)
    names, labels = np.unique([item.class_name for item in items], return_inverse=True)
    aside = np.zeros(len(items), bool)
    for label in range(len(names)):
        members = generator.permutation(np.flatnonzero(labels == label))
        aside[members[: round(TEST_SHARE * len(members))]] = True
    if not aside.any():
        raise FileError(
            folder,
            "no class holds the three samples that it takes to set one aside for "
            "testing; must hold more, or a test part of its own",
        )
    train = [item for item, away in zip(items, aside, strict=True) if not away]
    return train, [item for item, away in zip(items, aside, strict=True) if away]
