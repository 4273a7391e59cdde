"""20 Newsgroups as a TFDS data set, from the archive 20news-bydate that scikit-learn uses too."""

import gzip
import hashlib
import io
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import tensorflow_datasets as tfds

from fedrevive_jax.data.builders import manual_folder
from fedrevive_jax.data.errors import entries, read_file
from fedrevive_jax.data.newsgroups import CLASS_NAMES
from fedrevive_jax.errors import ConfigError, FileError, one_line

ARCHIVE = "20news-bydate.tar.gz"
URL = "https://ndownloader.figshare.com/files/5975967"
SHA256 = "8f1b2514ca22a5ade8fbb9cfa5727df95fa587f4c87b786e15c759fa66d95610"
FOLDERS = {"train": "20news-bydate-train", "test": "20news-bydate-test"}

_QUOTE = re.compile(r"writes in|writes:|wrote:|says:|said:|^In article|^Quoted from|^\||^>")


class Post(NamedTuple):
    """A post: its split's folder, its group, its number in the group, its bytes."""

    folder: str
    group: str
    number: str
    raw: bytes


class Newsgroups(tfds.core.GeneratorBasedBuilder):
    """Usenet posts of 20 groups, without headers, footers and quotes."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"{ARCHIVE} of http://qwone.com/~jason/20Newsgroups/, as it is or unpacked to "
        + " and ".join(FOLDERS.values())
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Usenet posts split by date. Headers, footers and quotes are removed by "
            "scikit-learn's rules; texts of which nothing is left are kept, empty.",
            features=tfds.features.FeaturesDict(
                {
                    "text": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(names=list(CLASS_NAMES)),
                }
            ),
            supervised_keys=("text", "label"),
            homepage="http://qwone.com/~jason/20Newsgroups/",
        )

    def _split_generators(self, dl_manager):
        folder = manual_folder(dl_manager)
        source = _manual_source(folder) if folder else _checked(Path(dl_manager.download(URL)))
        return {split: self._generate_examples(source, part) for split, part in FOLDERS.items()}

    def _generate_examples(self, source, part):
        found = False
        for post in posts(source):
            if post.folder == part:
                found = True
                # The archive is older than UTF-8 mail; scikit-learn decodes it like this, too.
                text = strip(post.raw.decode("latin-1"))
                yield f"{post.group}/{post.number}", {"text": text, "label": post.group}
        if not found:
            raise FileError(source, f"no posts in {part}")


def posts(source: Path) -> Iterator[Post]:
    """The posts of an archive, in its order, or of a folder, sorted.

    Raises:
      ConfigError: the archive is damaged, or a group is none of the 20.
    """
    for name, raw in _folder_files(source) if source.is_dir() else _archive_files(source):
        parts = PurePosixPath(name).parts[-3:]
        if len(parts) == 3 and parts[0] in FOLDERS.values():
            if parts[1] not in CLASS_NAMES:
                raise FileError(source, f"{name} is in none of the 20 groups")
            yield Post(*parts, raw)


def strip(text: str) -> str:
    """A post without header, footer and quotes, removed in that order as scikit-learn does."""
    return strip_quotes(strip_footer(strip_header(text)))


def strip_header(text: str) -> str:
    """What follows the first empty line; nothing if there is none."""
    return text.partition("\n\n")[2]


def strip_footer(text: str) -> str:
    """What comes before the last line that is empty or made of hyphens; all if there is none."""
    lines = text.strip().split("\n")
    for number in range(len(lines) - 1, 0, -1):
        if not lines[number].strip().strip("-"):
            return "\n".join(lines[:number])
    return text


def strip_quotes(text: str) -> str:
    """Lines that neither start with a quote's mark nor introduce a quote."""
    return "\n".join(line for line in text.split("\n") if not _QUOTE.search(line))


def _manual_source(folder: Path) -> Path:
    """The archive in a user's folder, or the folder if it holds what was unpacked."""
    if (folder / ARCHIVE).is_file():
        return folder / ARCHIVE
    if any((folder / part).is_dir() for part in FOLDERS.values()):
        return folder
    raise ConfigError(
        "manual_dir", folder, f"holds neither {ARCHIVE} nor {' and '.join(FOLDERS.values())}"
    )


def _checked(archive: Path) -> Path:
    """The downloaded archive, if it is whole; else it is removed, so that it is not used again."""
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256:
        archive.unlink()
        raise FileError(URL, f"SHA-256 of the download is {found}, must be {SHA256}")
    return archive


def _folder_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    for part in FOLDERS.values():
        for group in entries(folder / part):
            for path in entries(group):
                yield path.relative_to(folder).as_posix(), read_file(path)


def _check_member(archive: Path, member: tarfile.TarInfo) -> None:
    """Nothing is unpacked to disk; still, an archive that tries to get out of it is no data."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise FileError(archive, f"{member.name!r} points outside the archive; must not")
    if not member.isfile() and not member.isdir():
        raise FileError(
            archive, f"{member.name!r} is a link or a device; must be a file or a folder"
        )


def _archive_files(archive: Path) -> Iterator[tuple[str, bytes]]:
    try:
        # Unpacked as a whole (35 MB), which checks length and checksum; tarfile by itself does not
        # read up to the end, and would not see that an archive is cut there.
        unpacked = io.BytesIO(gzip.decompress(archive.read_bytes()))
        with tarfile.open(fileobj=unpacked) as opened:
            for member in opened:
                _check_member(archive, member)
                content = opened.extractfile(member)  # None for a folder
                if content is not None:
                    yield member.name, content.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise FileError(archive, f"cannot be read as an archive ({one_line(error)})") from None
