"""What a run derives from its data once and keeps in its folder.

Both can be derived again from the same configuration and data; keeping them saves the time, and
lets a checkpoint of a text model be evaluated with the very tokenizer it was trained with.
"""

import dataclasses
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedrevive_jax.partition import Shards
from fedrevive_jax.record import write_whole

TOKENIZER = "tokenizer.json"
CLIENTS = "clients.npz"


class Derived(NamedTuple):
    """Derived from the data of a run; empty where it has to be made.

    Attributes:
      tokenizer: JSON of a tokenizer trained on the training split.
      shards: who holds what.
    """

    tokenizer: str = ""
    shards: Shards | None = None


def read(folder: Path) -> Derived:
    """What a run's folder holds; a file that is missing or damaged counts as not there."""
    try:
        tokenizer = (folder / TOKENIZER).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        tokenizer = ""
    try:
        with np.load(folder / CLIENTS, allow_pickle=False) as arrays:
            shards = Shards(arrays["indices"], arrays["offsets"])
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        shards = None
    return Derived(tokenizer, shards)


def write(folder: Path, derived: Derived) -> None:
    """Keeps what there is; each file appears whole or not at all."""
    if derived.tokenizer:
        write_whole(folder / TOKENIZER, lambda stream: stream.write(derived.tokenizer.encode()))
    if derived.shards is not None:
        tables = dataclasses.asdict(derived.shards)
        write_whole(folder / CLIENTS, lambda stream: np.savez(stream, **tables))
