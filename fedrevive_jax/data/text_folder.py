"""A user's own texts in UTF-8, as files in folders named after their classes or as JSON lines.

Folders: DIR/train/class/file.txt and DIR/test/class/file.txt, or DIR/class/file.txt. JSON lines
{"label": "...", "text": "..."}: DIR/test.jsonl and, for training, all other DIR/*.jsonl; where
there are such files, folders are not looked at. Without a test part a fixed fifth of every class
is the test split.
"""

import json
from pathlib import Path

from fedrevive_jax.config import ConfigError
from fedrevive_jax.data import folders
from fedrevive_jax.data.folders import Item
from fedrevive_jax.data.texts import Texts


def load(data_dir: str, seed: int) -> Texts:
    """Reads the texts.

    Raises:
      ConfigError: the layout is wrong, or a text is empty, not UTF-8 or not as described above.
    """
    folder = folders.root(data_dir, "texts, in folders named after classes or in *.jsonl files")
    lines = [path for path in folders.visible(folder) if path.suffix == ".jsonl"]
    train, test = _from_lines(folder, lines) if lines else _from_files(folder)
    arranged = folders.arrange(folder, train, test, seed)
    texts = [item.content for item in arranged.items]
    return Texts("text_folder", arranged.class_names, texts, arranged.labels, arranged.splits)


def _from_files(folder: Path) -> tuple[list[Item], list[Item] | None]:
    train, test = folders.class_files(folder)
    return _read(train), None if test is None else _read(test)


def _read(items: list[Item]) -> list[Item]:
    """The items with the texts in place of the files."""
    for item in items:
        if item.content.suffix != ".txt" or not item.content.is_file():
            raise ConfigError(f"{item.where}: must be a .txt file, as all in a class folder")
    return [item._replace(content=_text(item.content.read_bytes(), item.where)) for item in items]


def _from_lines(folder: Path, files: list[Path]) -> tuple[list[Item], list[Item] | None]:
    train = [item for file in files if file.name != "test.jsonl" for item in _rows(file)]
    if not train:
        raise ConfigError(f"{folder}: no training texts, must hold a .jsonl file beside test.jsonl")
    test = folder / "test.jsonl"
    return train, _rows(test) if test in files else None


def _rows(file: Path) -> list[Item]:
    rows = []
    # Split as bytes: UTF-8 has more line ends than JSON lines.
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if line.strip():
            rows.append(_row(line, f"{file} line {number}"))
    if not rows:
        raise ConfigError(f"{file}: holds no texts")
    return rows


def _row(line: bytes, where: str) -> Item:
    try:
        row = json.loads(_text(line, where))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: is not JSON ({error})") from None
    for key in ("label", "text"):
        value = row.get(key) if isinstance(row, dict) else None
        if not isinstance(value, str) or not value.strip():
            raise ConfigError(f"{where}: must hold a {key!r} that is a text and not empty")
    return Item(where, row["label"], row["text"])


def _text(raw: bytes, where: str) -> str:
    """The text in UTF-8, with or without a byte order mark; not empty."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: is not UTF-8 text ({error})") from None
    if not text.strip():
        raise ConfigError(f"{where}: holds no text")
    return text
