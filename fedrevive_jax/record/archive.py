"""Pytrees of arrays as files, and a checksum for every leaf.

What is read back is either bit for bit what was written or a `CorruptError`. Nothing is pickled.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, TypedDict

import jax
import numpy as np

from fedrevive_jax.record.files import write_whole

# Of one leaf: dtype, shape, sha256; by the path of the leaf in its tree, like conv1/kernel.
Leaves = dict[str, dict[str, Any]]


class Sums(TypedDict):
    """What a stored tree is held to when it is read.

    Attributes:
      files: SHA-256 of every file that it lies in, by path; told before a decoder sees any of it.
      leaves: dtype, shape and checksum of every leaf; told of what the decoder gave.
    """

    files: dict[str, str]
    leaves: Leaves


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


def sum_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its path there."""
    return {
        path.relative_to(folder).as_posix(): _sum(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def check_files(folder: Path, files: dict[str, str]) -> None:
    """Compares files with their checksums.

    Raises:
      CorruptError: one is missing or has changed; it names the first.
    """
    for name, expected in files.items():
        try:
            found = _sum(folder / name)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise CorruptError(f"{name} is missing") from None
        except OSError as error:
            raise CorruptError(f"{name} cannot be read ({error.strerror})") from None
        if found != expected:
            raise CorruptError(f"the checksum of {name} failed")


def check_start(path: Path, size: int, sha256: str) -> None:
    """Compares the first bytes of a file, which may have grown since, with their checksum.

    Raises:
      CorruptError: there are fewer, or they have changed.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(size)
    except OSError as error:
        raise CorruptError(f"{path.name} cannot be read ({error.strerror})") from None
    if len(start) < size:
        raise CorruptError(f"{path.name} is shorter than it was")
    if hashlib.sha256(start).hexdigest() != sha256:
        raise CorruptError(f"the checksum of {path.name} failed")


def write(path: Path, tree: Any) -> Sums:
    """Writes a tree of NumPy arrays as a plain .npz, whole or not at all."""
    write_whole(path, lambda stream: np.savez(stream, *jax.tree.leaves(tree)))
    return {"files": {path.name: _sum(path)}, "leaves": describe(tree)}


def read(path: Path, shapes: Any, sums: Sums) -> Any:
    """Reads a tree that `write` has written.

    Args:
      path: the file.
      shapes: the tree's structure; leaves have a dtype.
      sums: what `write` gave.

    Raises:
      CorruptError: the file is missing, damaged, or holds something else.
    """
    check_files(path.parent, sums["files"])
    wanted, structure = jax.tree.flatten(shapes)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            values = [arrays[f"arr_{index}"] for index in range(len(wanted))]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise CorruptError(f"{path.name} holds something else ({error})") from None
    # NumPy stores dtypes that it does not know, like bfloat16, as plain bytes.
    values = [
        value.view(leaf.dtype) if value.dtype.kind == "V" else value
        for value, leaf in zip(values, wanted, strict=True)
    ]
    tree = jax.tree.unflatten(structure, values)
    check(tree, sums["leaves"])
    return tree


def write_sealed(path: Path, value: Any) -> None:
    """Writes plain JSON, and beside it its checksum in the form that `sha256sum -c` reads."""
    text = json.dumps(value).encode()
    write_whole(path, lambda stream: stream.write(text))
    write_whole(_seal(path), lambda stream: stream.write(_seal_text(path, text)))


def read_sealed(path: Path) -> Any:
    """Reads what `write_sealed` has written.

    Raises:
      CorruptError: a file is missing or has changed.
    """
    try:
        text, seal = path.read_bytes(), _seal(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise CorruptError(f"{path.name} or its checksum is missing") from None
    except OSError as error:
        raise CorruptError(f"{path.name} cannot be read ({error.strerror})") from None
    if seal != _seal_text(path, text):
        raise CorruptError(f"the checksum of {path.name} failed")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise CorruptError(f"{path.name} holds something else") from None


def is_sums(value: Any) -> bool:
    """Whether a value, read from a file, has the form of `Sums`."""

    def holds(part: Any, *names: str) -> bool:
        return isinstance(part, dict) and part.keys() == set(names)

    return (
        holds(value, "files", "leaves")
        and isinstance(value["files"], dict)
        and all(isinstance(digest, str) for digest in value["files"].values())
        and isinstance(value["leaves"], dict)
        and all(holds(leaf, "dtype", "shape", "sha256") for leaf in value["leaves"].values())
    )


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
    digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return {"dtype": dtype, "shape": shape, "sha256": digest.hexdigest()}


def _sum(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def seal_of(name: str) -> str:
    """The name of the file that holds the checksum of a sealed one."""
    return name + ".sha256"


def _seal(path: Path) -> Path:
    return path.with_name(seal_of(path.name))


def _seal_text(path: Path, text: bytes) -> bytes:
    return f"{hashlib.sha256(text).hexdigest()}  {path.name}\n".encode()
