"""What a method keeps of every client, see `methods.method.Method.entry`: N entries like the model.

They live on the device, in host memory, or in a file. The compiled server step never sees more than
the entry of the arriving client, which is fetched before it and stored after it, so that where the
entries live changes no result.
"""

import collections
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedrevive_jax.compute import devices, trees
from fedrevive_jax.config import Config
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.server.shelf import device_memory

# Entries on their way from the device: storing one waits for the step that computes it, so they are
# taken down only when a few newer steps have been handed to the device.
UNDER_WAY = 4


class NoCache:
    """For methods that keep nothing of their clients."""

    def fetch(self, client: int) -> Any:
        """The entry of a client; zeros before its first upload."""
        del client
        return ()

    def store(self, client: int, entry: Any) -> None:
        """Keeps an entry, arrays on the device."""

    def snapshot(self) -> Any:
        """All entries, a pytree of arrays [N, ...]. Read them before the next `store`, which may
        change them; a `np.memmap` among them is a copy that nobody changes."""
        return ()

    def shapes(self) -> Any:
        """The structure of a snapshot, `jax.ShapeDtypeStruct`s."""
        return ()

    def restore(self, arrays: Any) -> None:
        """Takes over a snapshot, arrays of JAX or NumPy."""


class DeviceCache:
    """All entries on the device, of a mesh on each."""

    def __init__(self, entry: Any, clients: int, mesh: Mesh | None = None):
        """Entries like `entry`, arrays or shapes of arrays, for clients 0 to `clients` - 1."""
        self._mesh = mesh
        self._rows = devices.jit(
            mesh,
            lambda: jax.tree.map(lambda leaf: jnp.zeros((clients, *leaf.shape), leaf.dtype), entry),
        )()
        self._get = devices.jit(mesh, lambda rows, at: jax.tree.map(lambda leaf: leaf[at], rows))
        self._put = devices.jit(
            mesh,
            lambda rows, at, entry: jax.tree.map(
                lambda leaf, new: leaf.at[at].set(new), rows, entry
            ),
            donate_argnums=0,
        )

    def fetch(self, client: int) -> Any:
        return self._get(self._rows, np.asarray(client, np.int32))

    def store(self, client: int, entry: Any) -> None:
        self._rows = self._put(self._rows, np.asarray(client, np.int32), entry)

    def snapshot(self) -> Any:
        return self._rows

    def shapes(self) -> Any:
        return jax.eval_shape(lambda: self._rows)

    def restore(self, arrays: Any) -> None:
        self._rows = None  # the device has room for one
        self._rows = devices.replicate(self._mesh, arrays)


class HostCache:
    """All entries in host memory, or in a file that is gone when the run ends."""

    def __init__(
        self, entry: Any, clients: int, mesh: Mesh | None = None, folder: str | None = None
    ):
        """Like `DeviceCache`; with a folder they live in a file there, of zeros that take no room
        until they are written."""
        self._mesh = mesh
        self._folder = folder
        self._rows = jax.tree.map(
            lambda leaf: self._room((clients, *leaf.shape), leaf.dtype), entry
        )
        self._under_way: collections.OrderedDict[int, Any] = collections.OrderedDict()

    def fetch(self, client: int) -> Any:
        if client in self._under_way:
            return self._under_way[client]
        # Copied: on a CPU a view would show what is stored later.
        entry = jax.tree.map(lambda rows: np.array(rows[client]), self._rows)
        return devices.replicate(self._mesh, entry)

    def store(self, client: int, entry: Any) -> None:
        self._under_way.pop(client, None)
        jax.tree.map(lambda leaf: leaf.copy_to_host_async(), entry)
        self._under_way[client] = entry
        if len(self._under_way) > UNDER_WAY:
            self._take_down(*self._under_way.popitem(last=False))

    def snapshot(self) -> Any:
        while self._under_way:
            self._take_down(*self._under_way.popitem(last=False))
        # On disk because there is no room elsewhere, so whoever keeps a snapshot must not copy it.
        return self._rows if self._folder is None else jax.tree.map(self._copy, self._rows)

    def shapes(self) -> Any:
        return jax.tree.map(lambda rows: jax.ShapeDtypeStruct(rows.shape, rows.dtype), self._rows)

    def restore(self, arrays: Any) -> None:
        self._under_way.clear()
        self._rows = jax.tree.map(lambda leaf: self._copy(np.asarray(leaf)), arrays)

    def _take_down(self, client: int, entry: Any) -> None:
        def put(rows, leaf):
            rows[client] = np.asarray(leaf)

        jax.tree.map(put, self._rows, entry)

    def _copy(self, rows: np.ndarray) -> np.ndarray:
        room = self._room(rows.shape, rows.dtype)
        room[...] = rows
        return room

    def _room(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        if self._folder is None:
            return np.zeros(shape, dtype)
        # The file has no name: whatever becomes of the process, nothing is left behind.
        with tempfile.TemporaryFile(dir=self._folder) as stream:
            stream.truncate(max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize))
            return np.memmap(stream, dtype, "r+", shape=shape)


ClientCache = NoCache | DeviceCache | HostCache


def create(config: Config, entry: Any, mesh: Mesh | None = None, beside: int = 0) -> ClientCache:
    """The cache of a run for entries like `entry`, the configured method's.

    Args:
      config: `num_clients` and the fields of the cache are read.
      entry: arrays or shapes of arrays.
      mesh: devices that compute together; each holds a cache on the device whole.
      beside: bytes that live on the device beside it.

    Raises:
      ConfigError: it cannot fit, or there is no such folder. Nothing has been allocated then.
    """
    if not jax.tree.leaves(entry):
        return NoCache()
    check_fit(config, config.num_clients * trees.nbytes(entry), beside)
    if config.cache_memory == "device":
        return DeviceCache(entry, config.num_clients, mesh)
    return HostCache(entry, config.num_clients, mesh, folder_of(config))


def folder_of(config: Config) -> str | None:
    """Where the file of a cache on disk lies; None where there is none."""
    if config.cache_memory != "disk":
        return None
    return config.cache_dir or tempfile.gettempdir()


def check_fit(config: Config, needed: int, beside: int = 0) -> None:
    """Whether a cache of `needed` bytes fits where it is to live, on the device with `beside` more.

    Beside it a checkpoint needs room for a copy: on the host, but for a cache on disk, which is
    copied on disk. On a CPU the device's memory is the host's, so that both are there.

    Raises:
      ConfigError: it does not.
    """
    folder, where = folder_of(config), config.cache_memory
    if folder is not None:
        if not (Path(folder).is_dir() and os.access(folder, os.W_OK | os.X_OK)):
            raise ConfigError("cache_dir", folder, "is not a folder that can be written to")
        room, needed = shutil.disk_usage(folder).free, 2 * needed
        where = f"disk with cache_dir={folder}"
    elif where == "device":
        memory = device_memory()
        room = memory and memory.limit
        if room is not None and needed > host_memory():
            raise ConfigError(
                "cache_memory",
                "device",
                f"a checkpoint copies {needed / 1e9:.1f} GB to the host, "
                f"which has {host_memory() / 1e9:.1f} GB; cache_memory=disk or "
                "cache_dtype=bfloat16 may help",
            )
        needed = needed + beside if room is not None else 2 * needed + beside
        room = host_memory() if room is None else room
    else:
        room, needed = host_memory(), 2 * needed
    if needed > room:
        raise ConfigError(
            "cache_memory",
            where,
            f"the last updates of num_clients={config.num_clients} and "
            f"what lives beside them need {needed / 1e9:.1f} GB there, of {room / 1e9:.1f} GB; "
            "another memory or cache_dtype=bfloat16 may help",
        )


def host_memory() -> int:
    """Memory that this process may use, in bytes: the machine's, or its control group's limit."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # another system, or no limit
        return physical
    return min(physical, limit)
