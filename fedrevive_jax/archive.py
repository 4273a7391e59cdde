"""Pytrees of arrays as files, and a checksum for every leaf.

What is read back is either bit for bit what was written or a `CorruptError`. Nothing is pickled.
"""

import hashlib
import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedrevive_jax.record import write_whole

# Of one leaf: dtype, shape, sha256; by the path of the leaf in its tree, like conv1/kernel.
Leaves = dict[str, dict[str, Any]]


class CorruptError(Exception):
    """What is on disk is not what was written; the message says what is wrong with it."""


def to_host(tree: Any) -> Any:
    """The arrays of a tree as arrays of NumPy, without a copy where that is possible."""
    return jax.tree.map(np.asarray, tree)


def describe(tree: Any) -> Leaves:
    """Dtype, shape and checksum of every leaf of a tree of NumPy arrays.

    The checksum is SHA-256 over the leaf's path, dtype, shape and raw bytes, so that values cannot
    be exchanged between leaves either.
    """
    return {name: _describe(name, leaf) for name, leaf in _by_name(tree).items()}


def check(tree: Any, leaves: Leaves) -> None:
    """Compares a tree of NumPy arrays with its description.

    Raises:
      CorruptError: the checksum of a leaf failed, or there are other leaves; it names the first.
    """
    found = _by_name(tree)
    if found.keys() != leaves.keys():
        raise CorruptError(f"it holds other arrays ({min(found.keys() ^ leaves.keys())})")
    for name, leaf in found.items():
        if _describe(name, leaf) != leaves[name]:
            raise CorruptError(f"the checksum of {name} failed")


def write(path: Path, tree: Any) -> Leaves:
    """Writes a tree of NumPy arrays as a plain .npz, whole or not at all."""
    write_whole(path, lambda stream: np.savez(stream, *jax.tree.leaves(tree)))
    return describe(tree)


def read(path: Path, shapes: Any, leaves: Leaves) -> Any:
    """Reads a tree that `write` has written.

    Args:
      path: the file.
      shapes: the tree's structure; leaves have a dtype.
      leaves: what `write` gave.

    Raises:
      CorruptError: the file is missing, damaged, or holds something else.
    """
    wanted, structure = jax.tree.flatten(shapes)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            values = [arrays[f"arr_{index}"] for index in range(len(wanted))]
        # NumPy stores dtypes that it does not know, like bfloat16, as plain bytes.
        values = [
            value.view(leaf.dtype) if value.dtype.kind == "V" else value
            for value, leaf in zip(values, wanted, strict=True)
        ]
    except FileNotFoundError:
        raise CorruptError(f"{path.name} is missing") from None
    except (OSError, KeyError, ValueError, TypeError, EOFError) as error:
        raise CorruptError(f"{path.name} cannot be read ({_line(error)})") from None
    except (NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise CorruptError(f"{path.name} is no archive of arrays ({_line(error)})") from None
    tree = jax.tree.unflatten(structure, values)
    try:
        check(tree, leaves)
    except CorruptError as error:
        raise CorruptError(f"{path.name}: {error}") from None
    return tree


def write_sealed(path: Path, value: Any) -> None:
    """Writes plain JSON with a checksum of itself, whole or not at all."""
    text = json.dumps({"sha256": _seal(value), "value": value})
    write_whole(path, lambda stream: stream.write(text.encode()))


def read_sealed(path: Path) -> Any:
    """Reads what `write_sealed` has written.

    Raises:
      CorruptError: the file is missing or damaged.
    """
    try:
        sealed = json.loads(path.read_bytes())
        value, seal = sealed["value"], sealed["sha256"]
    except (FileNotFoundError, NotADirectoryError):
        raise CorruptError(f"{path.name} is missing") from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CorruptError(f"{path.name} cannot be read ({_line(error)})") from None
    if _seal(value) != seal:
        raise CorruptError(f"the checksum of {path.name} failed")
    return value


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable, as fsync does for the contents of a file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _by_name(tree: Any) -> dict[str, np.ndarray]:
    named = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    if len(dict(named)) < len(named):
        raise ValueError("two leaves of a tree have the same path")
    return dict(named)


def _describe(name: str, leaf: np.ndarray) -> dict[str, Any]:
    dtype, shape = str(leaf.dtype), list(leaf.shape)
    digest = hashlib.sha256(json.dumps([name, dtype, shape]).encode())
    digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
    return {"dtype": dtype, "shape": shape, "sha256": digest.hexdigest()}


def _seal(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
