"""A user's own data: folders named after classes or files of rows, in parts that the user made.

The parts are `train`, `test` and `validation`. Without a `test` part a fixed fifth of every class
is set aside for testing. Without a `validation` part one is drawn by class from the training part.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedrevive_jax.data import names
from fedrevive_jax.data.dataset import split_by_class, split_sizes
from fedrevive_jax.data.errors import reading
from fedrevive_jax.errors import ConfigError, FileError

TEST_SHARE = 0.2
# Of a training part with a validation part beside it: what is kept for distillation.
DISTILLATION_SHARE = 0.1
PARTS = ("train", "test", "validation")
# What others call the parts: Test, testing, val, dev_set, valid2, train_images.
_TRAIN = r"(trains?|training|trn)"
_OTHER = (
    r"(tests?|testing|tst|val|valid|validate|validating|validations?|dev|devel|development|"
    r"eval|evaluation|holdout)"
)
_MORE = r"(set|data|images?|imgs?|texts?|files?|folder|split|part|[0-9])*"


class Item(NamedTuple):
    """A sample of the user's.

    Attributes:
      where: its file, and line where a file holds many; for messages.
      class_name: the class that the user gave it.
      content: the path of its file, or its text.
    """

    where: str
    class_name: str
    content: str


class Arranged(NamedTuple):
    """Samples in the order in which a data set holds them.

    Attributes:
      class_names: cleaned, in natural order, which is the order of the labels.
      items: training samples, then validation samples of the user's, then test samples.
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
    with reading(data_dir):
        if not folder.is_dir():
            raise ConfigError("data_dir", data_dir, "no such folder")
    return folder


def class_files(folder: Path) -> dict[str, list[Item]]:
    """The files under `folder`, by part; all of them as `train` where it is not divided.

    The layout is part/class/file, with the parts `train`, `test` and maybe `validation`, or
    class/file. Hidden files and files beside class folders are no data.

    Raises:
      FileError: a part comes without the others, a folder looks like a part, there is no class, or
        one has no files.
    """
    with reading(folder):
        inside = [path for path in visible(folder) if path.is_dir()]
    for path in inside:
        check_name(path, path.name)
    parts = {part: _class_folders(folder / part) for part in PARTS if folder / part in inside}
    if not parts:
        return {"train": _class_folders(folder)}
    for part in ("train", "test"):
        if part not in parts:
            raise FileError(folder, f"has a folder {next(iter(parts))!r} but no folder {part!r}")
    return parts


def check_name(path: Path, name: str) -> None:
    """Refuses what is named nearly as a part, so that nobody trains on what is for testing.

    Of a file's name one word is enough, as in `reviews-test`. There may be many files to train on,
    such as `train-1`.

    Raises:
      FileError: the name looks like that of a part and is none.
    """
    words = re.split(r"[\W_]+", name.casefold())
    joined = "".join(words)
    if path.is_dir():
        alike = re.fullmatch(f"({_TRAIN}|{_OTHER}){_MORE}", joined)
        hint = "; as a class it must lie inside the parts"
    else:
        others = [re.fullmatch(_OTHER + _MORE, word) for word in (*words, joined)]
        alike, hint = any(others) or re.fullmatch(_TRAIN, joined), ""
    if alike and name not in PARTS:
        raise FileError(
            path, f"looks like a part of the data; the parts are named {', '.join(PARTS)}{hint}"
        )


def arrange(folder: Path, parts: dict[str, list[Item]], seed: int) -> Arranged:
    """Numbers the classes and makes the splits; without a test part one is set aside.

    Raises:
      FileError: there are fewer than two classes, two names of classes look alike, a class has no
        training sample, or there is nothing to set aside.
    """
    parts = _cleaned(parts)
    class_names = tuple(names.ordered(item.class_name for item in parts["train"]))
    if len(class_names) < 2:
        raise FileError(folder, f"holds the classes {list(class_names)}, must hold two or more")
    numbers = {name: number for number, name in enumerate(class_names)}
    for item in (item for part in parts.values() for item in part):
        if item.class_name not in numbers:
            raise FileError(item.where, f"class {item.class_name!r} has no training sample")

    def labels_of(items: list[Item]) -> np.ndarray:
        return np.asarray([numbers[item.class_name] for item in items], np.int32)

    train = parts["train"]
    if "test" in parts:
        test = parts["test"]
    else:
        aside = _set_aside(folder, labels_of(train), len(class_names))
        test = [item for item, away in zip(train, aside, strict=True) if away]
        train = [item for item, away in zip(train, aside, strict=True) if not away]
    validation = parts.get("validation", [])
    labels = labels_of([*train, *validation, *test])
    ends = np.cumsum([len(train), len(validation), len(test)])
    own = np.split(np.arange(ends[-1], dtype=np.int32), ends[:-1])
    if validation:
        kept = round(DISTILLATION_SHARE * len(train))
        sizes = {"train": len(train) - kept, "distillation": kept}
    else:
        sizes = split_sizes(len(train))
    splits = split_by_class(labels[own[0]], sizes, seed)
    if validation:
        splits["validation"] = own[1]
    return Arranged(class_names, [*train, *validation, *test], labels, {**splits, "test": own[2]})


def visible(folder: Path) -> list[Path]:
    """What a folder holds, sorted by name, without hidden entries.

    Raises:
      FileError: it cannot be read, or an entry is a link that leads nowhere.
    """
    with reading(folder):
        inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for path in inside:
        with reading(path):
            if not path.exists():
                raise FileError(path, "is a link that leads nowhere")
    return inside


def _cleaned(parts: dict[str, list[Item]]) -> dict[str, list[Item]]:
    """The items with their class names cleaned.

    Raises:
      FileError: a class has no name, or two names look alike: one class, written in two ways.
    """
    cleaned: dict[str, str] = {}
    looks: dict[str, Item] = {}  # the first item of each
    for item in (item for part in parts.values() for item in part):
        if item.class_name in cleaned:
            continue
        try:
            cleaned[item.class_name] = names.clean(item.class_name)
        except ValueError as error:
            raise FileError(
                item.where, f"the name of its class, {item.class_name!a}, {error}"
            ) from None
        first = looks.setdefault(names.look(item.class_name), item)
        if first is not item:
            raise FileError(
                item.where,
                f"class {item.class_name!a} looks like class {first.class_name!a} of "
                f"{first.where}; the names differ in white space or in Unicode's normal form only",
            )
    return {
        part: [item._replace(class_name=cleaned[item.class_name]) for item in items]
        for part, items in parts.items()
    }


def _class_folders(folder: Path) -> list[Item]:
    with reading(folder):
        classes = [path for path in visible(folder) if path.is_dir()]
    if not classes:
        raise FileError(folder, "holds no folders, must hold one for each class")
    items = []
    for path in classes:
        files = visible(path)
        if not files:
            raise FileError(path, f"holds no files, must hold samples of class {path.name!r}")
        items += [Item(str(file), path.name, str(file)) for file in files]
    return items


def _set_aside(folder: Path, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Which samples are for testing: a fifth of every class, the same whatever the seed of a run.

    A class of one or two samples stays in the training split as a whole.
    """
    generator = np.random.default_rng(0)
    aside = np.zeros(len(labels), bool)
    for label in range(num_classes):
        members = generator.permutation(np.flatnonzero(labels == label))
        aside[members[: round(TEST_SHARE * len(members))]] = True
    if not aside.any():
        raise FileError(
            folder,
            "no class holds the three samples that it takes to set one aside for "
            "testing; must hold more, or a test part of its own",
        )
    return aside
