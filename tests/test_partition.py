"""Handing data to clients: sizes, wrap-around, class mixes, and no hanging at any alpha."""

import sys

import numpy as np
import pytest
import scipy.stats

from fedrevive_jax.data.partition import partition
from fedrevive_jax.errors import ConfigError

LABELS = np.repeat(np.arange(10), 60).astype(np.int32)
SAMPLES = np.flatnonzero(np.arange(600) % 6 > 0)  # 50 training samples of every class


def split(kind="dirichlet", **kwargs):
    options = {
        "num_classes": 10, "num_clients": 40, "samples_per_client": 35, "alpha": 0.5, "seed": 0,
        **kwargs,
    }  # fmt: skip
    return partition(kind, SAMPLES, LABELS, **options)


SMALLEST, LARGEST = 5e-324, sys.float_info.max


@pytest.mark.parametrize("alpha", [SMALLEST, 1e-300, 1e-6, 1e-3, 0.1, 0.5, 10.0, 1e6, LARGEST])
def test_every_client_gets_its_share_at_any_alpha(alpha):
    shards = split(alpha=alpha)
    assert np.diff(shards.offsets).tolist() == [35] * 40
    assert np.isin(shards.indices, SAMPLES).all()
    mixes = shards.class_mixes(LABELS, 10)
    np.testing.assert_allclose(mixes.sum(1), 1, rtol=1e-6)
    if alpha <= 1e-3:
        assert (mixes.max(axis=1) > 0.97).all()  # one class each
    if alpha >= 1e6:
        assert (np.abs(mixes - 0.1) <= 1 / 35).all()  # rounding of 3.5 samples


@pytest.mark.parametrize("alpha", [SMALLEST, 1e-300, 1e-6])
def test_no_class_is_preferred_where_each_client_has_one(alpha):
    shards = split(alpha=alpha, num_clients=2000)
    clients = np.bincount(shards.class_mixes(LABELS, 10).argmax(axis=1), minlength=10)
    assert (abs(clients - 200) < 5 * np.sqrt(2000 * 0.1 * 0.9)).all()  # five standard deviations


def test_samples_are_handed_out_evenly_with_wrap_around():
    """40 x 35 samples from 500: within a class, use counts differ by at most one pass."""
    shards = split()
    used = np.bincount(shards.indices, minlength=600)
    for label in range(10):
        counts = used[SAMPLES[LABELS[SAMPLES] == label]]
        assert counts.max() - counts.min() <= 1
    assert used.max() > 1


def test_class_mixes_follow_the_dirichlet_law():
    """A share of a class is Beta(alpha, 9 alpha); another alpha must fail the same test."""
    shards = split(num_clients=2000, samples_per_client=1000)
    shares = shards.class_mixes(LABELS, 10)[:, 0]
    # Counts are rounded to 1/1000; jitter of that width makes the law continuous again.
    jitter = np.random.default_rng(0).uniform(-0.5, 0.5, 2000) / 1000
    shares = np.clip(shares + jitter, 1e-9, 1)
    keep = shares > 0.02  # away from the rounding at zero
    for alpha, holds in ((0.5, True), (0.8, False)):
        law = scipy.stats.beta(alpha, 9 * alpha)
        below = law.cdf(0.02)
        p = scipy.stats.kstest(shares[keep], lambda x: (law.cdf(x) - below) / (1 - below)).pvalue  # noqa: B023
        assert (p > 1e-3) == holds


def test_iid_uses_every_sample_before_any_twice():
    shards = split("iid", num_clients=20, samples_per_client=25)
    assert sorted(shards.indices) == sorted(SAMPLES)


def test_natural_groups():
    groups = np.arange(600) % 7
    shards = split("natural", groups=groups, num_clients=7)
    for i in range(7):
        assert set(groups[shards.client(i)]) == {i}
    assert sorted(shards.indices) == sorted(SAMPLES)
    fewer = split("natural", groups=groups, num_clients=3)
    assert fewer.num_clients == 3
    assert all(len(set(groups[fewer.client(i)])) == 1 for i in range(3))


def test_natural_needs_groups_and_enough_of_them():
    with pytest.raises(ConfigError, match=r"partition=natural.*no natural groups"):
        split("natural")
    with pytest.raises(ConfigError, match=r"num_clients=8.*at most 7"):
        split("natural", groups=np.arange(600) % 7, num_clients=8)


def test_the_seed_decides():
    np.testing.assert_array_equal(split(seed=1).indices, split(seed=1).indices)
    assert (split(seed=1).indices != split(seed=2).indices).any()


def test_batches_walk_through_reshuffled_passes():
    shards = split()
    own = sorted(shards.client(3))
    batches = shards.batches(3, 0, steps=7, batch_size=10, seed=0)
    assert batches.shape == (7, 10)
    walk = batches.reshape(-1)
    assert sorted(walk[:35]) == own
    assert sorted(walk[35:]) == own
    assert (walk[:35] != walk[35:]).any()
    np.testing.assert_array_equal(batches, shards.batches(3, 0, steps=7, batch_size=10, seed=0))
    assert (batches != shards.batches(3, 1, steps=7, batch_size=10, seed=0)).any()
