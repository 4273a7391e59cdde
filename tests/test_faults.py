"""Failing clients: planned beforehand, the same whatever the windows, counted in the record."""

import hashlib

import jax
import numpy as np
import pytest

from fedrevive_jax.clock import schedule
from fedrevive_jax.clock.schedule import LATE, Fault
from fedrevive_jax.clock.windows import plan_windows
from fedrevive_jax.compute.streams import Stream
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.presets import resolve
from fedrevive_jax.record import files
from fedrevive_jax.record.health import (
    DIVERGED_AFTER,
    RECENT,
    DivergenceError,
    Health,
    RejectLimitError,
)
from fedrevive_jax.running import runner
from fedrevive_jax.simulation.simulator import Simulation
from tests.toys import Fixed, assert_same_params, clock, play, rows, small


def plan_of(method="fedrevive", **kwargs):
    return schedule.create(resolve("digits", method, **kwargs))


def check_contract(plan, concurrency, buffer_size):
    """The contract of `schedule`, lost uploads included."""
    time = plan.time
    before = np.concatenate([[0], plan.version[:-1]])
    assert (np.diff(time) >= 0).all()
    np.testing.assert_array_equal(plan.staleness, before - plan.base_version[plan.job])
    assert (plan.staleness >= 0).all()
    np.testing.assert_array_equal(plan.version, np.arange(1, plan.num_arrivals + 1) // buffer_size)
    assert not (plan.fault[plan.job] == Fault.LOST).any()
    for client in range(plan.client.max() + 1):
        own = np.flatnonzero(plan.client == client)
        assert (plan.start[own[1:]] >= plan.train_end[own[:-1]]).all()
    # A job starts from the newest version of its moment, and no more than K are under way: of
    # those handed out, as many have arrived, or been due and lost, as are missing from K.
    made = np.concatenate([[0.0], time])
    for job in range(concurrency, len(plan.client)):
        newest = np.searchsorted(made, plan.start[job], side="right") - 1
        assert plan.base_version[job] == (plan.version[newest - 1] if newest else 0)
    ends = np.where(plan.arrival_of_job >= 0, plan.arrival_time, np.inf)
    ends = np.where(plan.fault == Fault.LOST, plan.arrival_time, ends)
    for moment in time:
        assert ((plan.start <= moment) & (ends > moment)).sum() <= concurrency
    assert plan.live_versions_max() <= concurrency + 1
    trained = np.concatenate([window.jobs for window in plan_windows(plan)])
    assert sorted(trained) == sorted(plan.job)


# What the default presets planned before clients could fail.
BEFORE = {
    "fedrevive": (501, 501, "42ff8eb3744fe5bc"),
    "fedbuff": (501, 250, "abdb8b62c6432a47"),
    "fedavg": (117, 5, "843a2c2f4ed5d270"),
}


@pytest.mark.parametrize("method", BEFORE)
def test_without_failures_nothing_has_changed(method):
    plan = plan_of(method)
    digest = hashlib.sha256()
    for array in (
        plan.job, plan.client, plan.visit, plan.base_version, plan.version, plan.staleness,
        plan.jobs_started, plan.arrival_of_job,
    ):  # fmt: skip
        digest.update(array.astype("<i8").tobytes())
    told = (plan.num_arrivals, plan.num_versions, digest.hexdigest()[:16])
    assert told == BEFORE[method]
    assert plan.faults == {"lost": 0, "late": 0, "nan": 0}


class Told:
    """Draws that are told by a table of positions, else `default`."""

    def __init__(self, default, table):
        self._default, self._table = default, table

    def __getitem__(self, position):
        return self._table.get(position, self._default)


def test_hand_worked_failures(monkeypatch):
    """Two clients of training times 2 and 3, both always working; job 1 is lost, job 2 is late.

    Client 0 arrives at 2 and starts job 2, late: its 2 units become 10, but the client is free at
    4. Client 1's job 1 is due at 3 and never comes: client 1 is the only free one and starts job 3,
    still from version 1, arriving at 6. Then a free client is drawn among two, client 0 or 1.
    """
    failures, choices = Told(1.0, {1: 0.0, 2: 0.25}), Told(0.0, {})
    monkeypatch.setattr(
        schedule,
        "_UniformBlocks",
        lambda seed, stream: failures if stream == Stream.FAULT else choices,
    )
    plan = clock(
        Fixed([2.0, 3.0]), 2, 2, max_time=7.0, fault_rate=0.5,
        fault_kinds=[Fault.LOST, Fault.LATE],
    )  # fmt: skip
    assert plan.fault[:4].tolist() == [Fault.NONE, Fault.LOST, Fault.LATE, Fault.NONE]
    assert plan.time[:2].tolist() == [2.0, 6.0]
    assert plan.job[:2].tolist() == [0, 3]
    assert plan.start[:4].tolist() == [0, 0, 2, 3]
    assert plan.base_version[:4].tolist() == [0, 0, 1, 1]
    assert plan.arrival_time[2] == 2 + LATE * 2
    assert plan.train_end[2] == 4
    assert plan.jobs_started[0] == 4  # job 2 when job 0 arrived, job 3 before the next arrival
    assert plan.lost == 1
    assert plan.faults == {"lost": 1, "late": 0, "nan": 0}


@pytest.mark.parametrize("method", ["fedrevive", "fedbuff", "fedavg"])
@pytest.mark.parametrize("kinds", ["lost,late,nan", "lost", "late"])
def test_the_contract_holds_with_failures(method, kinds):
    plan = plan_of(method, fault_rate=0.4, fault_kinds=kinds)
    config = resolve("digits", method)
    check_contract(plan, config.concurrency, config.buffer_size)
    if method == "fedavg":  # one that is lost is replaced within its cohort
        assert (plan.staleness == 0).all()


def test_failures_are_drawn_at_their_rate_and_leave_other_draws_alone():
    """4,000 jobs: a share of 0.3 has a standard deviation of 0.0072, a third of it 0.0047; five of
    them are allowed. Another rate is further off."""
    plain, faulty = (
        plan_of(max_time=300.0, fault_rate=rate, fault_kinds="lost,nan,late") for rate in (0, 0.3)
    )
    shares = np.bincount(faulty.fault, minlength=4) / len(faulty.fault)
    assert len(faulty.fault) > 2000
    assert shares[0] == pytest.approx(0.7, abs=5 * 0.0102)
    for share in shares[1:]:
        assert share == pytest.approx(0.1, abs=5 * 0.0067)
    # The first visits of the clients that start at 0 last as long as ever, but for late ones.
    on_time = (faulty.fault[:20] != Fault.LATE).nonzero()[0]
    np.testing.assert_array_equal(plain.client[:20], faulty.client[:20])
    np.testing.assert_array_equal(plain.arrival_time[on_time], faulty.arrival_time[on_time])


def test_a_world_in_which_nothing_ever_comes():
    """`schedule.create` refuses it; the clock runs it."""
    lost = {"fault_rate": 1.0, "fault_kinds": [Fault.LOST]}
    plan = clock(Fixed([1.0] * 40), 40, 20, max_time=5.0, **lost)
    assert plan.num_arrivals == 0
    assert plan.lost == plan.faults["lost"] > 20
    assert plan_windows(plan) == []
    assert plan.initial_jobs == 20 + plan.lost


def test_too_long_a_plan_is_refused(monkeypatch):
    monkeypatch.setattr(schedule, "MOST_JOBS", 1000)
    with pytest.raises(ConfigError, match=r"max_time=1e\+300: plans more than 1000 jobs; must"):
        plan_of(max_time=1e300)


FAULTY = {"fault_rate": 0.5, "max_time": 12.0}


@pytest.mark.parametrize("method", ["fedrevive", "fedbuff"])
def test_windows_and_one_by_one_agree_with_failures(method):
    """Bit for bit: calls of one size in both, so that nothing is summed in another order. Uploads
    that are not finite are rejected, and nothing else is."""
    windowed, receipts, live = play(small(method, client_batch=4, **FAULTY))
    single, expected, _ = play(small(method, client_batch=4, window_limit=1, **FAULTY))
    assert len(windowed.windows) < len(single.windows) == len(expected) > 15
    assert rows(receipts) == rows(expected)
    assert_same_params(windowed, single, atol=0)
    plan = windowed.schedule
    assert all(plan.faults.values())
    accepted = [bool(receipt.accepted) for receipt in receipts]
    np.testing.assert_array_equal(accepted, plan.fault[plan.job] != Fault.NAN)
    windowed.server.review()
    assert windowed.server.rejected == {"not_finite": plan.faults["nan"]}
    assert live <= plan.live_versions_max()
    assert windowed.server._step._cache_size() == 1
    for x in jax.tree.leaves(windowed.server.params):
        assert np.isfinite(x).all()


def config_in(folder, **kwargs):
    common = {"checkpoint_every": 7, "eval_every": 4, "workdir": str(folder)}
    return small("fedbuff", **{"buffer_size": 1, **common, **kwargs})


@pytest.mark.slow
def test_the_record_counts_failures_and_continues_exactly(tmp_path, monkeypatch):
    config = config_in(tmp_path / "whole", **FAULTY)
    whole = runner.run(config, keep_record=True)
    plan = Simulation(config).schedule
    rows = files.read_rows(config.run_dir / files.ARRIVALS)
    expected = [plan.fault[job] == Fault.NAN for job in plan.job]
    assert [row["rejected"] == "not_finite" for row in rows] == expected
    assert [row["accepted"] for row in rows] == [not nan for nan in expected]
    assert whole.summary["faults"] == plan.faults
    assert whole.summary["rejected"] == {"not_finite": plan.faults["nan"]}
    assert whole.summary["skipped"] == {"synthesis": 0, "distillation": 0}

    again = config_in(tmp_path / "again", **FAULTY)
    advance = Simulation.advance

    def stop(self):
        if self.position == 20:
            raise KeyboardInterrupt
        return advance(self)

    with monkeypatch.context() as patch:
        patch.setattr(Simulation, "advance", stop)
        with pytest.raises(KeyboardInterrupt):
            runner.run(again, keep_record=True)
    continued = runner.run(again, keep_record=True)
    assert continued.resumed_version == 14
    assert files.read_rows(again.run_dir / files.ARRIVALS) == rows
    for key in ("rejected", "faults", "skipped", "final_accuracy"):
        assert continued.summary[key] == whole.summary[key]


def test_too_many_rejections_end_the_run_and_leave_a_good_checkpoint(tmp_path, monkeypatch):
    """Every upload is broken: the hundredth ends the run, and starting again says the same."""
    config = config_in(
        tmp_path / "run", fault_rate=1.0, fault_kinds="nan", max_time=40.0, local_iterations=1,
        checkpoint_every=1000,
    )  # fmt: skip
    message = (
        r"^reject_limit=0.5: 100 of the last 100 uploads up to version \d+ were rejected "
        r"\(in the whole run \d+ not_finite\); at most 50 may be$"
    )
    with pytest.raises(RejectLimitError, match=message):
        runner.run(config, keep_record=True)
    assert not (config.run_dir / files.SUMMARY).exists()
    rows = files.read_rows(config.run_dir / files.ARRIVALS)
    assert len(rows) >= RECENT
    monkeypatch.setattr(Simulation, "advance", None)  # nothing is trained any more
    with pytest.raises(RejectLimitError, match=message):
        runner.run(config, keep_record=True)
    assert files.read_rows(config.run_dir / files.ARRIVALS) == rows


def arrival_row(rejected=None, loss=1.0):
    return {"rejected": rejected, "loss": loss, "version": 7}


def test_health_by_hand():
    health = Health(0.25)
    for turn in range(RECENT):
        health.arrival(arrival_row("update_norm" if turn % 4 == 0 else None))
    assert health.trouble is None  # 25 of 100 are not more than a quarter
    health.arrival(arrival_row("update_norm"))  # takes the place of a rejected one
    assert health.trouble is None
    health.arrival(arrival_row("not_finite"))
    assert isinstance(health.trouble, RejectLimitError)
    assert "26 of the last 100" in str(health.trouble)
    assert "26 update_norm, 1 not_finite" in str(health.trouble)

    never = Health(1.0)
    for _ in range(2 * RECENT):
        never.arrival(arrival_row("not_finite"))
    assert never.trouble is None

    for kind in ("training", "evaluation"):
        for broken in (float("nan"), float("inf"), None):  # None: as JSON keeps them
            health = Health(1.0)
            show = {
                "training": lambda loss, h=health: h.arrival(arrival_row(loss=loss)),
                "evaluation": lambda loss, h=health: h.metrics(
                    {"kind": "evaluation", "version": 7, "loss": loss}
                ),
            }[kind]
            for _ in range(DIVERGED_AFTER - 1):
                show(broken)
            show(1.0)
            for _ in range(DIVERGED_AFTER - 1):
                show(broken)
            assert health.trouble is None
            show(broken)
            assert isinstance(health.trouble, DivergenceError)
            assert f"the last 10 {kind} losses up to version 7" in str(health.trouble)
