"""The simulation: windows change nothing, limits hold between methods, nothing is recompiled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarking import measuring
from fedrevive_jax import models
from fedrevive_jax.clients.local_training import train
from fedrevive_jax.config import METHODS
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.simulation import sizing
from fedrevive_jax.simulation.simulator import Simulation
from tests.toys import assert_same_params, play, rows, small


@pytest.mark.parametrize("method", METHODS)
def test_windows_and_one_by_one_agree(method):
    """The same arrivals row by row and the same parameters; one trace of the server step and of
    local training, whatever arrives.

    Training four jobs in one call sums in another order than one job (1e-7 relative); Adam may
    turn that into differences of the size of its rate where a gradient is all rounding. After about
    25 arrivals, steps of at most server_lr * client_lr * 2 = 2e-3 each, the parameters agree to a
    hundredth of a single step.
    """
    windowed, receipts, live = play(small(method, client_batch=4))
    single, expected, _ = play(small(method, client_batch=1, window_limit=1))
    assert len(windowed.windows) < len(single.windows) == len(expected) > 5
    assert rows(receipts) == rows(expected)
    assert_same_params(windowed, single, atol=2e-5)
    np.testing.assert_allclose(
        *([float(r.metrics["beta"]) for r in play] for play in (receipts, expected)), rtol=1e-6
    )
    assert live <= windowed.schedule.live_versions_max() <= 6 + 1
    assert windowed.server._step._cache_size() == windowed._train._cache_size() == 1
    if method == "fedrevive":
        assert any(float(r.metrics["beta"]) > 0 for r in receipts)


@pytest.mark.parametrize(
    ("method", "fields", "others"),
    [
        ("fedbuff", {}, 0),
        ("fedbuff", {"version_memory": "host"}, 0),
        ("ca2fl", {}, 1),  # the client's entry goes back to its cache
        ("fedrevive", {}, 0),
    ],
)
def test_what_was_compiled_beside_training_is_what_runs(method, fields, others):
    """The first arrival does not compile the step again, wherever versions wait and entries are."""
    simulation = Simulation(small(method, **fields))
    simulation.train_ahead()
    simulation._compiled.result()
    with measuring.compilations() as seen:
        simulation.advance()
    assert seen.count == others
    assert simulation.server._step._cache_size() == 1


def test_what_fails_beside_training_is_told_at_the_arrival(monkeypatch):
    simulation = Simulation(small("fedbuff"))

    def fail():
        raise MemoryError("no room")

    monkeypatch.setattr(simulation.server, "compile", fail)
    with pytest.raises(MemoryError, match="no room"):
        simulation.advance()


def test_the_limit_of_windows_changes_nothing_in_bfloat16():
    """Bit for bit, since calls have one size; calls of another size are the control."""
    settings = {"precision": "bfloat16", "client_batch": 4, "max_time": 3.0}
    free, limited, alone = (
        play(small("fedbuff", **{**settings, **changes}))[0]
        for changes in ({}, {"window_limit": 1}, {"client_batch": 1})
    )
    assert len(free.windows) < len(limited.windows)
    assert_same_params(free, limited, atol=0)
    with pytest.raises(AssertionError):
        assert_same_params(free, alone, atol=0)


@pytest.mark.parametrize(("size", "stopped"), [(3, 7), (2, 7), (2, 9)])
def test_a_run_goes_on_with_calls_of_any_size(size, stopped):
    """As on other devices: nothing is trained twice, and nothing that is due is missing. At 7 two
    uploads wait; at 9 none does, and calls of two would have left one."""
    whole, expected, _ = play(small("fedbuff", client_batch=3))
    begun = Simulation(small("fedbuff", client_batch=3))
    receipts = [begun.advance() for _ in range(stopped)]
    assert len(begun.uploads) == {7: 2, 9: 0}[stopped]
    record, arrays = begun.snapshot()
    again = Simulation(small("fedbuff", client_batch=size))
    assert again.jobs_in_a_call == size
    again.restore(record, begun.server.params, arrays)
    trained, train_jobs = [], again.train_jobs
    again.train_jobs = lambda jobs: trained.extend(jobs.tolist()) or train_jobs(jobs)
    receipts += list(again.arrivals())
    assert rows(receipts) == rows(expected)
    arrived = {receipt.job for receipt in receipts[stopped:]}
    assert sorted([*trained, *begun.uploads]) == sorted(arrived)
    if size == 3:
        assert len(again.windows) == len(whole.windows)
    assert_same_params(again, whole, atol=0 if size == 3 else 2e-5)


def test_uneven_windows_and_padding_change_nothing():
    """Windows of at most 3 in calls of 2: the last call of a window is padded by repetition."""
    a, receipts, _ = play(small("fedbuff", client_batch=2, window_limit=3))
    b, expected, _ = play(small("fedbuff", client_batch=5))
    assert rows(receipts) == rows(expected)
    assert_same_params(a, b, atol=2e-5)


def test_jobs_in_a_call():
    """As many as asked for, but no more than are in flight; `window_limit` does not matter."""
    many = Simulation(small("fedbuff", client_batch=50))
    assert 1 < many.jobs_in_a_call <= 6
    assert many.jobs_in_a_call == sizing.jobs_in_a_call(many.schedule, 50)
    assert Simulation(small("fedbuff", client_batch=2)).jobs_in_a_call == 2
    limited = Simulation(small("fedbuff", client_batch=50, window_limit=2))
    assert limited.jobs_in_a_call == many.jobs_in_a_call


def test_a_job_is_what_one_client_would_compute_alone():
    """The first upload of a window against a plain call on the client's own samples."""
    config = small("fedavg", client_batch=4)
    simulation = Simulation(config)
    simulation.train_ahead()
    job = int(simulation.windows[0].jobs[2])
    client = int(simulation.schedule.client[job])
    positions = simulation._shards.batches(client, 0, steps=2, batch_size=8, seed=config.seed)
    batches = (
        jnp.asarray(simulation.dataset.samples[positions] / np.float32(255)),
        jnp.asarray(simulation.dataset.labels[positions]),
    )
    alone = train(
        simulation.model, simulation.server.params, batches, lambda b: (*b, None), config.client_lr
    )
    upload = simulation.uploads[job]
    for x, y in zip(
        *map(jax.tree.leaves, ((upload.params, upload.taps), (alone.params, alone.taps))),
        strict=True,
    ):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_fedrevive_without_blending_is_fedbuff_of_one():
    plain, receipts, _ = play(small("fedbuff", buffer_size=1, server_lr=0.3))
    revived, others, _ = play(
        small("fedrevive", beta_shape="constant", beta_constant=0.0, server_lr=0.3)
    )
    assert rows(receipts) == rows(others)
    assert_same_params(plain, revived, atol=0)
    blended, _, _ = play(small("fedrevive", server_lr=0.3))
    with pytest.raises(AssertionError):  # the control: with blending they differ
        assert_same_params(plain, blended, atol=1e-4)


def test_fedbuff_of_a_whole_cohort_is_fedavg():
    average, receipts, _ = play(small("fedavg", server_lr=1.0))
    buffered, others, _ = play(small("fedbuff", buffer_size=6, open_slots=6, server_lr=1.0))
    assert rows(receipts) == rows(others)
    assert {r.staleness for r in receipts} == {0}
    assert_same_params(average, buffered, atol=0)


def test_a_cohort_moves_the_model_by_the_mean_of_its_updates():
    """FedAvg's first round, the mean taken in NumPy from the uploads themselves."""
    simulation = Simulation(small("fedavg", server_lr=1.4, client_batch=6))
    start = jax.tree.map(np.asarray, simulation.server.params)
    simulation.train_ahead()
    uploads = [upload.params for upload in simulation.uploads.values()]
    assert len(uploads) == 6
    for job, upload in simulation.uploads.items():
        simulation.server.submit(job, upload)
    mean = jax.tree.map(lambda s, *p: s + 1.4 * (np.mean(p, axis=0) - s), start, *uploads)
    for x, y in zip(*map(jax.tree.leaves, (simulation.server.params, mean)), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_a_model_for_other_data_is_refused():
    other = models.make_network("digitsnet", input_shape=(12, 12, 1), num_classes=10, width=4)
    with pytest.raises(ConfigError, match=r"takes \(12, 12, 1\).*data set has \(8, 8, 1\)"):
        Simulation(small("fedavg"), model=other)


def test_true_histograms_and_uniform_targets_run():
    simulation, receipts, _ = play(
        small("fedrevive", proxy="histogram", judges="all", target_sampling="uniform")
    )
    assert simulation.server.version == len(receipts)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(simulation.server.params))


def test_the_same_seed_gives_the_same_run_bit_for_bit():
    one, again = (play(small("fedrevive"))[0] for _ in range(2))
    assert_same_params(one, again, atol=0)
    first, other = (play(small("fedbuff", seed=seed))[0] for seed in (0, 1))  # the control
    with pytest.raises(AssertionError):
        assert_same_params(first, other, atol=1e-3)


def test_methods_are_paired():
    """The same seed gives the same population, shards, delays and start to every method."""
    one, other = (Simulation(small(m, buffer_size=1, open_slots=1)) for m in ("fedbuff", "afl_dw"))
    np.testing.assert_array_equal(one.schedule.arrival_time, other.schedule.arrival_time)
    np.testing.assert_array_equal(one._shards.indices, other._shards.indices)
    assert_same_params(one, other, atol=0)


def test_evaluation_is_of_the_whole_split_whatever_the_batch():
    simulation = Simulation(small("fedbuff"))
    whole = simulation.evaluate()
    odd = Simulation(dataclasses.replace(simulation.config, eval_batch=77)).evaluate()
    images = simulation.dataset.samples[simulation.dataset.splits["test"]] / np.float32(255)
    logits, _ = simulation.model.apply(simulation.server.params, jnp.asarray(images))
    truth = simulation.dataset.labels[simulation.dataset.splits["test"]]
    right = np.asarray(logits.argmax(1) == truth)
    assert whole.accuracy == odd.accuracy == pytest.approx(right.mean())
    assert whole.loss == pytest.approx(odd.loss, rel=1e-6)
    by_class = [right[truth == c].mean() for c in range(10)]
    assert whole.per_class == pytest.approx(by_class)
