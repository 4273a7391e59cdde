"""Labelled texts that synthesis of text starts from."""

from pathlib import Path
from typing import Any

import numpy as np

from fedrevive_jax.data import json_lines, names, tokens
from fedrevive_jax.data.dataset import Dataset
from fedrevive_jax.errors import ConfigError, FileError


def read(path: str, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [n, length] and labels [n], int32.

    Args:
      path: a file of JSON lines; a label is a class, see `names.label_of`.
      dataset: whose tokenizer, classes and length to use.

    Raises:
      ConfigError: the file is missing or a row is not one; the line is named.
    """
    if dataset.tokenizer is None:
        lack = "has no tokenizer" if dataset.is_text else "is not text"
        raise ConfigError("seed_text", path, f"{dataset.name} {lack}")
    rows = json_lines.read(Path(path).expanduser())
    labels = [_label(row.label, dataset, row.where) for row in rows]
    texts = [row.text for row in rows]
    ids = tokens.encode(dataset.tokenizer, texts, dataset.input_shape[0])
    return ids, np.asarray(labels, np.int32)


def _label(label: Any, dataset: Dataset, where: str) -> int:
    try:
        return names.label_of(label, dataset.classes)
    except ValueError as error:
        raise FileError(where, f"has label {label!r}; {error}") from None
