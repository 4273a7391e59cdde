"""A run's folder as bytes, for workers that do not see the folder of the comparison."""

import hashlib
import io
import shutil
import tarfile
from pathlib import Path
from typing import NamedTuple

from fedrevive_jax.config import Config
from fedrevive_jax.errors import ConfigError, UserError
from fedrevive_jax.record import files, lock

# Bytes of a folder that is sent while its run goes on; it waits in the memory of the scheduler.
MOST = 256 * 2**20


class Parcel(NamedTuple):
    """A packed folder.

    Attributes:
      archive: a tar file.
      sha256: its digest, in hexadecimal.
    """

    archive: bytes
    sha256: str


def size(folder: Path) -> int:
    """Bytes of all files of a folder.

    Raises:
      OSError: a file is gone meanwhile.
    """
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def pack(folder: Path) -> Parcel:
    """A folder of a run without what means nothing elsewhere. Its files may grow meanwhile: what
    counts of them is in the checkpoints.

    Raises:
      OSError: a file is gone meanwhile.
    """

    def chosen(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        # A link, such as some trackers leave, leads nowhere on another machine.
        if not (member.isfile() or member.isdir()):
            return None
        name = Path(member.name).name
        return None if name == lock.NAME or name.endswith(".partial") else member

    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.add(folder, arcname=".", filter=chosen)
    return Parcel(stream.getvalue(), hashlib.sha256(stream.getvalue()).hexdigest())


def unpack(parcel: Parcel, folder: Path) -> None:
    """Writes what was packed into a folder, and nothing outside of it.

    Raises:
      UserError: the parcel is damaged. Nothing has been written then.
      OSError: the folder cannot be written.
    """
    if hashlib.sha256(parcel.archive).hexdigest() != parcel.sha256:
        raise UserError(f"{folder}: what a worker sent was damaged on the way; run it again")
    folder.mkdir(parents=True)
    try:
        with tarfile.open(fileobj=io.BytesIO(parcel.archive)) as archive:
            archive.extractall(folder, filter="data")
    except tarfile.TarError as error:
        shutil.rmtree(folder)
        raise UserError(f"{folder}: what a worker sent is no folder of a run ({error})") from None


def mend(folder: Path) -> None:
    """Puts a folder back whose delivery died after it had been put aside.

    Raises:
      OSError: it cannot be renamed.
    """
    if _leaving(folder).exists() and not folder.exists():
        _leaving(folder).rename(folder)


def _leaving(folder: Path) -> Path:
    """Where a folder lies while another one takes its place."""
    return folder.with_name(folder.name + ".leaving")


def deliver(parcel: Parcel, config: Config) -> None:
    """Puts a folder that a worker sent back in the place of the run's own, whole or not at all.

    Raises:
      UserError: the parcel is damaged, or of another run.
      ConfigError: the folder cannot be written, or a process writes it now.
    """
    folder = config.run_dir
    arriving, leaving = folder.with_name(folder.name + ".arriving"), _leaving(folder)
    try:
        mend(folder)
        for rest in (arriving, leaving):  # of a process that died in the midst of this
            shutil.rmtree(rest, ignore_errors=True)
        unpack(parcel, arriving)
        differences = files.configured_differently(arriving, config)
        if differences:
            shutil.rmtree(arriving)
            raise UserError(f"{folder}: a worker sent another run ({'; '.join(differences)})")
        written = files.read_json(arriving / files.CONFIG)
        files.write_json(arriving / files.CONFIG, {**written, "workdir": str(folder)})
        if folder.exists():
            with lock.exclusive(folder):
                folder.rename(leaving)
                arriving.rename(folder)
            shutil.rmtree(leaving)
        else:
            arriving.rename(folder)
    except OSError as error:
        raise ConfigError("workdir", folder, f"cannot be written ({error.strerror})") from None
