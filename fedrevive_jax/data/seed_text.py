"""Labelled texts that synthesis of text starts from."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from fedrevive_jax.config import ConfigError
from fedrevive_jax.data import tokens
from fedrevive_jax.data.dataset import Dataset


def read(path: str, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [n, length] and labels [n], int32.

    Args:
      path: a JSONL file of rows with `label`, a class name or number, and `text`.
      dataset: whose tokenizer, classes and length to use.

    Raises:
      ConfigError: the file is missing or a row is not one; the line is named.
    """
    if dataset.tokenizer is None:
        raise ConfigError(f"--seed_text={path}: {dataset.name} is not text")
    try:
        lines = Path(path).expanduser().read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"--seed_text={path}: cannot be read ({error.strerror})") from None
    rows = [
        _row(line, dataset, f"--seed_text={path}: line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not rows:
        raise ConfigError(f"--seed_text={path}: holds no rows")
    texts, labels = zip(*rows, strict=True)
    ids = tokens.encode(dataset.tokenizer, texts, dataset.input_shape[0])
    return ids, np.asarray(labels, np.int32)


def _row(line: bytes, dataset: Dataset, where: str) -> tuple[str, int]:
    """(text, label) of one line."""
    try:
        row = json.loads(line)
    except ValueError:
        raise ConfigError(f"{where} is not JSON in UTF-8") from None
    text, label = (row.get(key) if isinstance(row, dict) else None for key in ("text", "label"))
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"{where} has no text")
    return text, _label(label, dataset, where)


def _label(label: Any, dataset: Dataset, where: str) -> int:
    if label in dataset.class_names:
        return dataset.class_names.index(label)
    if type(label) is int and 0 <= label < dataset.num_classes:
        return label
    raise ConfigError(
        f"{where} has label {label!r}; must be a class name or 0..{dataset.num_classes - 1}"
    )
