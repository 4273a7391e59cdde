"""Folders in buckets, such as gs://bucket/runs/1, worked on through copies on this machine.

A bucket has no locks, no file that grows, and no folder that gets its name at once. So nobody works
in the bucket itself. What is read is copied from it first. What is written is a folder of this
machine, which is copied to the bucket again and again, see `Mirror`.
"""

import contextlib
import errno
import fnmatch
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from etils import epath

from fedrevive_jax.config import is_bucket
from fedrevive_jax.errors import ConfigError, UserError, one_line

# Files that are copied at the same time; a bucket takes long to answer, but answers many at once.
AT_ONCE = 16

Wanted = Callable[[str], bool]


def everything(name: str) -> bool:
    return bool(name)


class Mirror:
    """A folder of this machine, and one in a bucket that is made equal to it by `push`.

    A process may die at any moment of a push. Files are copied in an order that is given, and what
    is gone here is deleted last, in the opposite order: what says that others are whole comes after
    them and goes before them.

    Attributes:
      folder: the one of this machine; it is temporary.
    """

    def __init__(self, place: str, order: Callable[[str], int], passed_over: Wanted):
        """Makes an empty folder; the bucket is not touched.

        Args:
          place: the folder in the bucket.
          order: gives the place of a file in a push, by its path below the folder.
          passed_over: whether a file stays here.
        """
        self.folder = Path(tempfile.mkdtemp(prefix="fedrevive-"))
        self._place, self._order, self._passed_over = epath.Path(place), order, passed_over
        # What is in the bucket: size and time of the file here that it was copied from or to.
        self._there: dict[str, tuple[int, int] | None] = {}

    def pull(self, wanted: Wanted = everything) -> None:
        """Copies the bucket's folder, of its files those that are wanted.

        After a pull of a part a push would delete the rest.

        Raises:
          ConfigError: the bucket cannot be read.
        """
        with _told("workdir", self._place):
            found = _copy_from(self._place, self.folder, wanted)
            states = _states(self.folder)
            self._there = {name: states.get(name) for name in found}

    def push(self) -> None:
        """Makes the bucket's folder equal to this machine's.

        Raises:
          OSError: it cannot be written.
        """
        here = {n: state for n, state in _states(self.folder).items() if not self._passed_over(n)}
        changed = [name for name, state in here.items() if self._there.get(name) != state]
        try:
            for place in sorted({self._order(name) for name in changed}):
                together = [name for name in changed if self._order(name) == place]
                _at_once(
                    [(self.folder / name, self._place / name) for name in together], _copy_file
                )
                self._there.update((name, here[name]) for name in together)
            for name in sorted(self._there.keys() - here, key=self._order, reverse=True):
                (self._place / name).unlink(missing_ok=True)
                del self._there[name]
        except Exception as error:  # each kind of bucket has errors of its own
            raise OSError(errno.EIO, one_line(error)) from error

    def close(self) -> None:
        """Removes the folder of this machine."""
        shutil.rmtree(self.folder, ignore_errors=True)


def matching(pattern: str, field: str) -> list[str]:
    """Folders of this machine or of a bucket; in a bucket * stands in the last name alone.

    Raises:
      ConfigError: the bucket cannot be read.
    """
    if not is_bucket(pattern):
        return sorted(glob.glob(pattern))
    place = epath.Path(pattern)
    with _told(field, pattern):
        found = place.parent.iterdir() if place.parent.is_dir() else ()
        return sorted(str(path) for path in found if fnmatch.fnmatch(path.name, place.name))


@contextlib.contextmanager
def copied(place: str | os.PathLike, field: str, wanted: Wanted = everything) -> Iterator[Path]:
    """A copy of a bucket's folder on this machine; errors name the place in the bucket.

    Raises:
      ConfigError: the bucket cannot be read; `field` is blamed.
    """
    with tempfile.TemporaryDirectory(prefix="fedrevive-") as folder, named(folder, place):
        with _told(field, place):
            _copy_from(epath.Path(place), Path(folder), wanted)
        yield Path(folder)


@contextlib.contextmanager
def at_hand(place: Path, field: str, wanted: Wanted = everything) -> Iterator[Path]:
    """The folder itself, or a copy where it is in a bucket, see `copied`."""
    if not is_bucket(place):
        yield place
        return
    with copied(place, field, wanted) as folder:
        yield folder


@contextlib.contextmanager
def updated(place: Path, field: str, owned: Sequence[str] = ()) -> Iterator[Path]:
    """A folder to write files into: the folder itself, or an empty one whose files are put into the
    bucket at the end, without their folders.

    Args:
      place: the folder.
      field: what is blamed.
      owned: names of files that are gone from the bucket if they have not been written.

    Raises:
      ConfigError: the bucket cannot be written.
    """
    if not is_bucket(place):
        yield place
        return
    bucket = epath.Path(place)
    with tempfile.TemporaryDirectory(prefix="fedrevive-") as name, named(name, place):
        folder = Path(name)
        yield folder
        with _told(field, place, "written"):
            written = sorted(path for path in folder.iterdir() if path.is_file())
            _at_once([(path, bucket / path.name) for path in written], _copy_file)
            for gone in sorted(set(owned) - {path.name for path in written}):
                if (bucket / gone).exists():
                    (bucket / gone).unlink()


@contextlib.contextmanager
def named(folder: str | os.PathLike, place: str | os.PathLike) -> Iterator[None]:
    """Errors for the user name a place in the bucket where they would name its copy."""
    try:
        yield
    except UserError as error:
        words = [
            str(part).replace(str(folder), str(place)) if isinstance(part, str | Path) else part
            for part in error.args
        ]
        raise type(error)(*words) from error.__cause__


def _copy_from(place: epath.Path, folder: Path, wanted: Wanted) -> list[str]:
    """Copies what is wanted, and makes all folders; returns the paths of all files."""
    found = dict(_files(place))
    for name in found:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    _at_once([(path, folder / name) for name, path in found.items() if wanted(name)], _copy_file)
    return list(found)


def _files(folder: epath.Path, below: str = "") -> Iterator[tuple[str, epath.Path]]:
    """Path below the folder, and whole path, of every file."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path == folder:  # some tools mark a folder by an empty file of its name
            continue
        if path.is_dir():
            yield from _files(path, f"{below}{path.name}/")
        else:
            yield below + path.name, path


def _states(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below a folder of this machine."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    stats = {path.relative_to(folder).as_posix(): path.stat() for path in paths}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def _copy_file(source: Path | epath.Path, target: Path | epath.Path) -> None:
    with source.open("rb") as reading, target.open("wb") as writing:
        shutil.copyfileobj(reading, writing, 2**20)


def _at_once(items: list[tuple], function: Callable) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(lambda item: function(*item), items):
            pass


@contextlib.contextmanager
def _told(field: str, place: str | os.PathLike, done: str = "read") -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each kind of bucket has errors of its own
        raise ConfigError(field, place, f"cannot be {done} ({one_line(error)})") from error
