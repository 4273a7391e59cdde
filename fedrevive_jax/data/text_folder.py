"""A user's own texts in UTF-8, as files in folders named after their classes or as JSON lines.

Folders: DIR/train/class/file.txt and DIR/test/class/file.txt, or DIR/class/file.txt. JSON lines
{"label": "...", "text": "..."}: DIR/test.jsonl and, for training, all other DIR/*.jsonl; where
there are such files, folders are not looked at. Without a test part a fixed fifth of every class
is the test split.
"""

from pathlib import Path

from fedrevive_jax.data import folders, json_lines
from fedrevive_jax.data.folders import Item
from fedrevive_jax.data.texts import Texts
from fedrevive_jax.errors import FileError


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
    return [item._replace(content=_text(item)) for item in items]


def _text(item: Item) -> str:
    path = item.content
    if path.suffix != ".txt" or not path.is_file():
        raise FileError(item.where, "must be a .txt file, as all in a class folder")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise FileError(item.where, f"cannot be read ({error.strerror})") from None
    text = json_lines.decode(raw, item.where)
    if not text.strip():
        raise FileError(item.where, "holds no text")
    return text


def _from_lines(folder: Path, files: list[Path]) -> tuple[list[Item], list[Item] | None]:
    train = [item for file in files if file.name != "test.jsonl" for item in _rows(file)]
    if not train:
        raise FileError(folder, "no training texts, must hold a .jsonl file beside test.jsonl")
    test = folder / "test.jsonl"
    return train, _rows(test) if test in files else None


def _rows(file: Path) -> list[Item]:
    rows = json_lines.read(file)
    for row in rows:
        if not isinstance(row.label, str) or not row.label.strip():
            raise FileError(row.where, "must hold a 'label' that is a text and not empty")
    return [Item(*row) for row in rows]
