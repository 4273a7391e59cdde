"""A user's own texts in UTF-8, as files in folders named after their classes or as JSON lines.

Folders: DIR/PART/class/file.txt with the parts train, test and maybe validation, or
DIR/class/file.txt. JSON lines {"label": "...", "text": "..."}: DIR/test.jsonl, maybe
DIR/validation.jsonl and, for training, all other DIR/*.jsonl; where there are such files, folders
are no data. Without a test part a fixed fifth of every class is the test split.
"""

from pathlib import Path

from fedrevive_jax.data import folders, json_lines
from fedrevive_jax.data.errors import reading
from fedrevive_jax.data.folders import Item
from fedrevive_jax.data.texts import Texts
from fedrevive_jax.errors import FileError

LINES = ".jsonl"


def load(data_dir: str, seed: int) -> Texts:
    """Reads the texts.

    Raises:
      ConfigError: the layout is wrong, or a text is empty, not UTF-8 or not as described above.
    """
    folder = folders.root(data_dir, "texts, in folders named after classes or in *.jsonl files")
    inside = folders.visible(folder)
    lines = [path for path in inside if path.suffix.casefold() == LINES]
    parts = _from_lines(folder, inside) if lines else _from_files(folder)
    arranged = folders.arrange(folder, parts, seed)
    texts = [item.content for item in arranged.items]
    return Texts("text_folder", arranged.class_names, texts, arranged.labels, arranged.splits)


def _from_files(folder: Path) -> dict[str, list[Item]]:
    """The items with the texts in place of the files."""
    return {
        part: [item._replace(content=_text(item)) for item in items]
        for part, items in folders.class_files(folder).items()
    }


def _text(item: Item) -> str:
    path = Path(item.content)
    with reading(path):
        if path.suffix != ".txt" or not path.is_file():
            raise FileError(item.where, "must be a .txt file, as all in a class folder")
        raw = path.read_bytes()
    text = json_lines.decode(raw, item.where)
    if not text.strip():
        raise FileError(item.where, "holds no text")
    return text


def _from_lines(folder: Path, inside: list[Path]) -> dict[str, list[Item]]:
    parts: dict[str, list[Item]] = {}
    for path in inside:
        name = path.name.partition(".")[0]
        if path.suffix == LINES:
            folders.check_name(path, path.stem)
            part = path.stem if path.stem in folders.PARTS else "train"
            parts.setdefault(part, []).extend(_rows(path))
        elif path.suffix.casefold() == LINES or name in folders.PARTS:
            raise FileError(path, f"is beside texts in {LINES} files; must be such a file, too")
        else:
            folders.check_name(path, name)
    if "train" not in parts:
        given = " and ".join(f"{part}{LINES}" for part in parts)
        raise FileError(folder, f"no training texts, must hold a {LINES} file beside {given}")
    return {part: parts[part] for part in folders.PARTS if part in parts}


def _rows(file: Path) -> list[Item]:
    rows = json_lines.read(file)
    for row in rows:
        if not isinstance(row.label, str) or not row.label.strip():
            raise FileError(row.where, "must hold a 'label' that is a text and not empty")
    return [Item(*row) for row in rows]
