"""When synthesis and distillation are due: by hand, and a plan against the run itself."""

import jax
import numpy as np
import pytest

from fedrevive_jax.config import Dfkd
from fedrevive_jax.dfkd import due
from fedrevive_jax.presets import resolve
from fedrevive_jax.simulation import planning
from fedrevive_jax.simulation.simulator import Simulation
from tests.toys import SMALL


def test_synthesis_by_hand():
    """T_gen = 3 from version 4 on; once a version."""
    settings = Dfkd(freeze_versions=4, warmup_versions=4, generation_interval=3)
    assert np.flatnonzero(due.synthesis(settings, np.arange(13))).tolist() == [6, 9, 12]
    assert not due.synthesis(settings, 6, synthesised_version=6)
    assert due.syntheses_per_arrival(settings, buffer_size=2) == 1 / 6


@pytest.mark.parametrize(
    ("freeze", "warmup", "interval", "first"),
    [(4, 6, 3, 7), (4, 4, 3, 6), (6, 6, 3, 7), (0, 0, 10, 1), (50, 50, 30, 60)],
)
def test_the_first_distillation_by_hand(freeze, warmup, interval, first):
    """Past the warm-up, and not before the first samples; beta = 0 distils nothing."""
    settings = Dfkd(freeze_versions=freeze, warmup_versions=warmup, generation_interval=interval)
    versions = np.arange(100)
    assert np.flatnonzero(due.distillation(settings, True, versions, 0.5)).min() == first
    assert not due.distillation(settings, True, versions, 0.0).any()
    # With samples that are there from the start it is past the warm-up alone.
    there = np.flatnonzero(due.distillation(settings, False, versions, 0.5)).min()
    assert there == (warmup + 1 if warmup else 0)


def test_the_adversarial_term_by_hand():
    """From the version after the warm-up on; as in the authors' code after so many syntheses."""
    versions, done = np.arange(8), np.arange(8) // 2
    by_versions = Dfkd(freeze_versions=1, warmup_versions=3)
    assert np.flatnonzero(due.adversarial(by_versions, versions, done)).tolist() == [4, 5, 6, 7]
    by_syntheses = Dfkd(freeze_versions=1, warmup_versions=3, adversarial_start="syntheses")
    assert np.flatnonzero(due.adversarial(by_syntheses, versions, done)).tolist() == [6, 7]
    assert np.flatnonzero(due.warming_up(by_versions, versions)).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("fedrevive", {"freeze_versions": 1, "warmup_versions": 1, "generation_interval": 4}),
        ("fedrevive", {"buffer_size": 2, "generation_interval": 2}),
        ("dd_fedrevive", {}),
    ],
)
def test_a_plan_counts_what_the_run_does(method, changes):
    config = resolve("digits", method, **{**SMALL, **changes})
    simulation = Simulation(config)
    planned = planning.revivals(config, simulation.schedule)
    told = [jax.device_get(receipt.metrics) for receipt in simulation.arrivals()]
    done = {"distillations": sum(np.isfinite(row["distillation"]) for row in told)}
    if method == "fedrevive":
        done["syntheses"] = sum(np.isfinite(row["synthesis"]) for row in told)
    assert planned == done
    assert 0 < planned["distillations"] < len(told) or method == "dd_fedrevive"
