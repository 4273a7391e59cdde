"""What a run was made of and what it derived from that, kept in its folder from the start.

    origin.json      where the first parameters come from; the data's digest and the names of their
                     classes; digests of the files that were read beside them, and of the two below
    clients.npz      who holds what; a live federation does not know
    tokenizer.json   for text, unless it comes with pretrained weights

A model can be continued or evaluated with these alone: another tokenizer or other tables would give
figures that look right and are not. So a file that is missing or has changed is refused, and never
made again from what the data are now.
"""

import dataclasses
import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedrevive_jax.config import Config
from fedrevive_jax.data import tokens
from fedrevive_jax.data.partition import Shards
from fedrevive_jax.errors import ConfigError, FileError
from fedrevive_jax.models import t5_weights
from fedrevive_jax.record.files import write_json, write_whole

TOKENIZER = "tokenizer.json"
CLIENTS = "clients.npz"
ORIGIN = "origin.json"


class Sources(NamedTuple):
    """What a run reads.

    Attributes:
      data_sha256: `Dataset.digest`.
      classes: names of the classes, in the order of the labels.
      inputs: SHA-256 of the files that it reads beside its data, by the field that names them;
        empty for one that is not there.
    """

    data_sha256: str
    classes: tuple[str, ...]
    inputs: dict[str, str]


class Derived(NamedTuple):
    """What a run has derived, and from what; empty where it has to be made.

    Attributes:
      tokenizer: JSON of a tokenizer that was trained on the training split.
      shards: who holds what.
      origin: `start`, where the first parameters come from; for a pretrained T5 `weights_sha256`
        and `tokenizer_sha256`; for text `tokenizer`, where that comes from.
      sources: what was read.
    """

    tokenizer: str = ""
    shards: Shards | None = None
    origin: dict[str, str] | None = None
    sources: Sources | None = None


class Known(NamedTuple):
    """What is known of a recorded model; see `Derived`."""

    origin: dict[str, str]
    sources: Sources
    tokenizer: str


def sources_of(config: Config, data_sha256: str, classes: tuple[str, ...]) -> Sources:
    """What a run reads, on such data, as it is now."""

    def file(path: str) -> str:
        return _sum(Path(path).read_bytes())

    def pretrained(folder: str) -> str:
        return _sum((t5_weights.digest(folder) + tokens.digest(folder)).encode())

    inputs = {}
    for name, digest in (
        ("seed_text", file), ("delay_trace", file), ("t5_weights", pretrained)
    ):  # fmt: skip
        if getattr(config, name):
            try:
                inputs[name] = digest(getattr(config, name))
            except (OSError, ConfigError):
                inputs[name] = ""  # whoever needs it tells what is wrong with it
    return Sources(data_sha256, classes, inputs)


def changed(kept: Sources, now: Sources) -> str:
    """How what is read differs from what a run has read, in words; empty where it does not."""
    if kept.data_sha256 != now.data_sha256:
        return f"other data (SHA-256 {kept.data_sha256[:12]}, now {now.data_sha256[:12]})"
    for name in sorted(kept.inputs.keys() | now.inputs.keys()):
        if kept.inputs.get(name) != now.inputs.get(name):
            return f"another file for `{name}`"
    return ""


def write(folder: Path, derived: Derived, sources: Sources) -> None:
    """Keeps what there is. Each file appears whole or not at all, the one with the digests last.

    Raises:
      ConfigError: the folder cannot be written.
    """
    assert derived.origin is not None
    contents = {}
    if derived.shards is not None:
        tables = io.BytesIO()
        np.savez(tables, **dataclasses.asdict(derived.shards))
        contents[CLIENTS] = tables.getvalue()
    if derived.tokenizer:
        contents[TOKENIZER] = derived.tokenizer.encode()
    origin = {
        **derived.origin,
        **sources._asdict(),
        "files": {name: _sum(content) for name, content in contents.items()},
    }
    try:
        for name, content in contents.items():
            write_whole(folder / name, lambda stream, content=content: stream.write(content))
        write_json(folder / ORIGIN, origin)
    except OSError as error:
        raise ConfigError("workdir", folder, f"cannot be written ({error.strerror})") from None


def read(folder: Path) -> Derived:
    """All that a run's folder keeps.

    Raises:
      FileError: a file is missing, has changed, or is of another version of the package.
    """
    origin, sources, digests = _read_origin(folder)
    shards = _read_shards(folder, digests) if CLIENTS in digests else None
    return Derived(_read_tokenizer(folder, digests), shards, origin, sources)


def _read_shards(folder: Path, digests: dict[str, str]) -> Shards:
    content = _read(folder / CLIENTS, digests)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return Shards(arrays["indices"], arrays["offsets"])
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile):  # what nobody here has written
        raise FileError(folder / CLIENTS, "holds something else") from None


def read_known(folder: Path) -> Known:
    """What an evaluation needs.

    Raises:
      FileError: see `read`.
    """
    origin, sources, digests = _read_origin(folder)
    return Known(origin, sources, _read_tokenizer(folder, digests))


def read_sources(folder: Path) -> Sources:
    """What a run has read.

    Raises:
      FileError: see `read`.
    """
    return _read_origin(folder)[1]


def _read_origin(folder: Path) -> tuple[dict[str, str], Sources, dict[str, str]]:
    """The origin, the sources, and the digests of the other files."""
    path = folder / ORIGIN
    content = _read(path)
    try:
        kept = json.loads(content)
        digests, classes = kept.pop("files"), kept.pop("classes")
        sources = Sources(kept.pop("data_sha256"), tuple(classes), kept.pop("inputs"))
        if (
            all(map(_is_texts, (digests, kept, sources.inputs)))
            and all(isinstance(text, str) for text in (sources.data_sha256, *classes))
            and "start" in kept
        ):
            return kept, sources, digests
    except (ValueError, RecursionError, AttributeError, LookupError, TypeError):
        pass
    raise FileError(path, "is damaged, or of another version of fedrevive_jax")


def _read_tokenizer(folder: Path, digests: dict[str, str]) -> str:
    return _read(folder / TOKENIZER, digests).decode() if TOKENIZER in digests else ""


def _read(path: Path, digests: dict[str, str] | None = None) -> bytes:
    """The content of a file of the run, held to its digest where there are any."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FileError(path, f"cannot be read ({error.strerror}){_AGAIN}") from None
    if digests is not None and _sum(content) != digests[path.name]:
        raise FileError(path, f"has changed since the run began{_AGAIN}")
    return content


_AGAIN = "; put it back, or use overwrite=True to start afresh"


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _sum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
