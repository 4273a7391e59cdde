"""Messages of libraries and of the file system in the one line that a user is shown."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedrevive_jax.errors import FileError, one_line


@contextlib.contextmanager
def reading(where: Any) -> Iterator[None]:
    """What the file system refuses inside becomes a line about `where`.

    Raises:
      FileError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise FileError(where, f"cannot be read ({error.strerror or one_line(error)})") from None


def read_file(path: Path) -> bytes:
    """What a file holds.

    Raises:
      FileError: it cannot be read, or is something else, such as a pipe, that would be waited for.
    """
    with reading(path):
        if path.exists() and not path.is_file():
            raise FileError(path, "is no file")
        return path.read_bytes()


def entries(folder: Path) -> list[Path]:
    """What a folder holds, sorted by name; nothing where there is no such folder.

    Raises:
      FileError: it cannot be read. `Path.glob` would find nothing in it.
    """
    with reading(folder):
        return sorted(folder.iterdir()) if folder.is_dir() else []
