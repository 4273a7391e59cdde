"""What a run derives from its data and inputs when it starts, kept in its folder.

Who holds what and the tokenizer could be derived again from the same data; keeping them saves the
time, and lets a text model be evaluated with the very tokenizer it was trained with. The origin
tells what the run started from, also while it is under way and when that is gone.
"""

import dataclasses
import json
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedrevive_jax.data.partition import Shards
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.record.files import write_json, write_whole

TOKENIZER = "tokenizer.json"
CLIENTS = "clients.npz"
ORIGIN = "origin.json"


class Derived(NamedTuple):
    """What a run has derived; empty where it has to be made.

    Attributes:
      tokenizer: JSON of a tokenizer that was trained on the training split.
      shards: who holds what.
      origin: `start`, where the first parameters come from; for a pretrained T5 `weights_sha256`;
        for text `tokenizer`, where that comes from.
    """

    tokenizer: str = ""
    shards: Shards | None = None
    origin: dict[str, str] | None = None


def read(folder: Path) -> Derived:
    """What a run's folder holds; a file that is missing or damaged counts as not there."""
    try:
        tokenizer = (folder / TOKENIZER).read_text(encoding="utf-8")
        json.loads(tokenizer)
    except (OSError, ValueError, RecursionError):
        tokenizer = ""
    try:
        with np.load(folder / CLIENTS, allow_pickle=False) as arrays:
            shards = Shards(arrays["indices"], arrays["offsets"])
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        shards = None
    try:
        origin = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        origin = None
    return Derived(tokenizer, shards, origin if isinstance(origin, dict) else None)


def write(folder: Path, derived: Derived) -> None:
    """Keeps what there is; each file appears whole or not at all.

    Raises:
      ConfigError: the folder cannot be written.
    """
    try:
        if derived.tokenizer:
            write_whole(folder / TOKENIZER, lambda stream: stream.write(derived.tokenizer.encode()))
        tables = dataclasses.asdict(derived.shards)
        write_whole(folder / CLIENTS, lambda stream: np.savez(stream, **tables))
        write_json(folder / ORIGIN, derived.origin)
    except OSError as error:
        raise ConfigError("workdir", folder, f"cannot be written ({error.strerror})") from None
