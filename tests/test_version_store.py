"""Stale versions: counted references, bounded lifetime, a helpful error."""

import pytest

from fedrevive_jax.server.version_store import VersionNotFoundError, VersionStore


def test_a_version_lives_as_long_as_it_is_referred_to_or_newest():
    store = VersionStore(0, "zero")
    store.acquire(0)
    store.acquire(0)
    store.put(1, "one")
    assert store.live == (0, 1)
    store.release(0)
    assert store.get(0) == "zero"
    store.release(0)
    assert store.live == (1,)
    store.put(2, "two")  # nobody refers to 1
    assert store.live == (2,)
    store.acquire(2)
    store.release(2)  # the newest stays
    assert store.live == (2,)


def test_a_version_that_is_gone_is_a_typed_error_that_names_the_live_ones():
    store = VersionStore(3, None)
    store.acquire(3)
    store.put(7, None)
    with pytest.raises(VersionNotFoundError, match="version 5 is not stored; live versions: 3, 7"):
        store.get(5)
    with pytest.raises(VersionNotFoundError):
        store.acquire(0)


def test_misuse():
    store = VersionStore(2, None)
    with pytest.raises(ValueError, match="not newer"):
        store.put(2, None)
    with pytest.raises(ValueError, match="no references"):
        store.release(2)
