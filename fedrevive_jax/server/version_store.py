"""Stale global parameters by version, kept exactly as long as somebody may still need them."""

from typing import Any

from fedrevive_jax.server.shelf import ON_DEVICE, Shelf


class VersionNotFoundError(LookupError):
    """A version was asked for that was never stored or is gone."""


class VersionStore:
    """Parameter pytrees by version, reference-counted.

    The newest version is always kept. An older one is kept while it has references: one for each
    job that started from it and has not arrived. The trees are never copied and must never be
    donated to a compiled function: a donated buffer is deleted, and the next reader would fail.
    """

    def __init__(self, version: int, params: Any, shelf: Shelf = ON_DEVICE):
        """Starts with one version; older ones will wait on the shelf."""
        self._shelf = shelf
        self._params = {version: params}
        self._references = {version: 0}
        self._newest = version

    @property
    def newest(self) -> int:
        """The newest version."""
        return self._newest

    @property
    def live(self) -> tuple[int, ...]:
        """All versions that are kept, oldest first."""
        return tuple(sorted(self._params))

    def get(self, version: int) -> Any:
        """Parameters of a version, on the device.

        Raises:
          VersionNotFoundError: it is not kept; the message names the live versions.
        """
        stored = self.stored(version)
        return stored if version == self._newest else self._shelf.fetch(stored)

    def stored(self, version: int) -> Any:
        """Parameters of a version where they are.

        Raises:
          VersionNotFoundError: it is not kept; the message names the live versions.
        """
        try:
            return self._params[version]
        except KeyError:
            live = ", ".join(map(str, self.live))
            raise VersionNotFoundError(
                f"version {version} is not stored; live versions: {live}"
            ) from None

    def put(self, version: int, params: Any) -> None:
        """Stores a newer version and drops the one it replaces if nobody refers to that.

        Raises:
          ValueError: the version is not newer than the newest.
        """
        if version <= self._newest:
            raise ValueError(f"version {version} is not newer than {self._newest}")
        replaced, self._newest = self._newest, version
        self._params[version] = params
        self._references[version] = 0
        self._params[replaced] = self._shelf.store(self._params[replaced])
        self._drop_if_unused(replaced)

    def acquire(self, version: int) -> None:
        """Adds a reference to a version that is kept."""
        self.stored(version)
        self._references[version] += 1

    def release(self, version: int) -> None:
        """Takes one reference away and drops the version when it was the last.

        Raises:
          ValueError: the version has no references.
        """
        self.stored(version)
        if self._references[version] == 0:
            raise ValueError(f"version {version} has no references to release")
        self._references[version] -= 1
        self._drop_if_unused(version)

    def _drop_if_unused(self, version: int) -> None:
        if version != self._newest and self._references[version] == 0:
            del self._params[version], self._references[version]
