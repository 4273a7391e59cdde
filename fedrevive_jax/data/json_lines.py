"""Labelled texts as JSON lines: {"label": ..., "text": "..."}, a row a line, in UTF-8."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from fedrevive_jax.data.errors import read_file
from fedrevive_jax.errors import FileError, one_line


class Row(NamedTuple):
    """A row: where it stands (file and line, for messages), its label as it came, its text."""

    where: str
    label: Any
    text: str


def read(path: Path) -> list[Row]:
    """All rows of a file; empty lines are skipped.

    Raises:
      ConfigError: the file cannot be read or holds no rows, or a row has no label or no text.
    """
    raw = read_file(path)
    # Split as bytes: UTF-8 has more line ends than JSON lines.
    lines = enumerate(raw.split(b"\n"), start=1)
    rows = [_row(line, f"{path} line {number}") for number, line in lines if line.strip()]
    if not rows:
        raise FileError(path, "holds no texts")
    return rows


def check_text(text: Any, where: str) -> str:
    """The text, if it is one, is not empty and can be written in UTF-8."""
    if not isinstance(text, str) or not text.strip():
        raise FileError(where, "must hold a 'text' that is a text and not empty")
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        raise FileError(where, "its text is not valid Unicode") from None
    return text


def decode(raw: bytes, where: str) -> str:
    """UTF-8 with or without a byte order mark."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(where, f"is not UTF-8 text ({one_line(error)})") from None


def _row(line: bytes, where: str) -> Row:
    try:
        row = json.loads(decode(line, where))
    except (
        ValueError,
        RecursionError,
    ) as error:  # of long numbers, of deep nesting
        raise FileError(where, f"is not JSON ({one_line(error)})") from None
    if not isinstance(row, dict) or row.get("label") in (None, ""):
        raise FileError(where, "must hold a 'label' that is not empty")
    return Row(where, row["label"], check_text(row.get("text"), where))
