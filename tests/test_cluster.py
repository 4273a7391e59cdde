"""Comparisons on workers of Dask: lost, stopped, wrong and blind ones, and what they send back."""

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading

import dask
import distributed
import pytest

from fedrevive_jax.comparison import campaign, cluster, parcels, plans, runs, worker
from fedrevive_jax.errors import ConfigError, UserError
from fedrevive_jax.presets import resolve
from fedrevive_jax.record import files, lock
from fedrevive_jax.record.interruption import InterruptedRunError
from tests.commands import flags, started
from tests.dask_processes import scheduler, until
from tests.dask_processes import worker as started_worker
from tests.soak_kills import differences
from tests.toys import SMALL

# Every version is saved and kept, so that it is seen which ones a continuation did not make again.
GIVEN = {**SMALL, "dataset": "digits", "model_width": 2, "max_time": 5.0, "checkpoint_every": 1,
         "checkpoint_keep": 1000}  # fmt: skip
METHODS = ["fedbuff", "fedasync"]
HERE = worker.Facts(worker.versions(), "cpu", 1)


def planned(out, methods=METHODS):
    return plans.of_methods(GIVEN, methods, 1, out)


def saved(config):
    """When each checkpoint of a run was written, by version; in seconds."""
    found = config.run_dir.glob("checkpoints/*/record.json.sha256")
    whole = [path for path in found if path.parent.name.isdigit()]
    return {int(path.parent.name): int(path.stat().st_mtime) for path in whole}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The same comparison in this process."""
    configs = planned(tmp_path_factory.mktemp("alone"))
    campaign.run_all(configs, notify=lambda line: None)
    return configs


def assert_same(configs, reference):
    for config, other in zip(configs, reference, strict=True):
        assert differences(config, other) == []


class _Asked:
    """An interruption that is asked for once something is seen."""

    grace = 300.0

    def __init__(self, seen):
        self._seen = seen

    @property
    def requested(self):
        return self._seen()


@pytest.mark.slow
def test_a_killed_worker_is_replaced_by_another(tmp_path, reference, caplog):
    """Its run goes on from its newest checkpoint, and nothing else differs from a comparison in one
    process."""
    configs = planned(tmp_path / "runs")
    (tmp_path / "runs").mkdir()
    killed, before = configs[1], {}

    def kill():
        until(lambda: len(saved(killed)) > 2)
        os.kill(json.loads((killed.run_dir / lock.NAME).read_text())["pid"], signal.SIGKILL)
        before.update(saved(killed))

    with contextlib.ExitStack() as stack:
        address = stack.enter_context(scheduler(tmp_path))
        two = [stack.enter_context(started_worker(address, "--nthreads=1")) for _ in range(2)]
        workers = stack.enter_context(campaign.Workers(scheduler=address, out=tmp_path / "runs"))
        killer = threading.Thread(target=kill)
        killer.start()
        lines = []
        campaign.run_all(configs, workers, notify=lines.append)
        killer.join()
        assert sorted(process.poll() is None for process in two) == [False, True]
    assert sorted(line.split(":")[0] for line in lines) == ["fedasync_seed0", "fedbuff_seed0"]
    assert "fedasync_seed0: its worker" in caplog.text
    assert_same(configs, reference)
    after = saved(killed)
    assert 2 < len(before) < len(after)
    assert before == {version: after[version] for version in before}
    assert not list((tmp_path / "runs").glob(".seen*"))


@pytest.mark.slow
def test_a_run_whose_comparison_was_killed_saves_and_stops(tmp_path):
    """So that the same command can go on with it. Nobody tells the worker: it has to see that who
    asked is gone, long before the run would have come to its end."""
    given = {**GIVEN, "max_time": 200.0}
    (config,) = plans.of_methods(given, METHODS[1:], 1, tmp_path / "runs")
    given |= {"methods": "fedasync", "seeds": 1, "out": tmp_path / "runs"}
    with scheduler(tmp_path) as address, started_worker(address, "--nthreads=1"):
        with started(*flags(**given, scheduler=address), program="compare") as command:
            until(lambda: len(saved(config)) > 2)
            command.kill()
            command.communicate()
        until(lambda: not lock.is_held(config.run_dir))
        before = saved(config)
        assert not (config.run_dir / files.SUMMARY).exists()
        # The worker is free for it again.
        asked = _Asked(lambda: len(saved(config)) > len(before) + 2)
        with (
            campaign.Workers(scheduler=address, out=tmp_path / "runs") as workers,
            pytest.raises(InterruptedRunError),
        ):
            campaign.run_all([config], workers, interruption=asked)
    after = saved(config)
    assert 2 < len(before) < len(after)
    assert before == {version: after[version] for version in before}


@pytest.mark.slow
def test_a_signal_reaches_the_processes_of_this_machine(tmp_path):
    """Both runs save and stop; nothing is left of the processes."""
    given = {**GIVEN, "max_time": 50.0, "methods": "fedasync", "seeds": 2, "out": tmp_path}
    configs = plans.of_methods({**GIVEN, "max_time": 50.0}, METHODS[1:], 2, tmp_path)
    with started(*flags(**given, jobs=2), "--grace=300", program="compare") as command:
        until(lambda: all(len(saved(config)) > 2 for config in configs))
        command.send_signal(signal.SIGTERM)
        _, errors = command.communicate()
    assert command.returncode == 143
    assert errors == "interrupted: 0 of 2 runs are done, those under way have saved\n"
    for config in configs:
        assert not (config.run_dir / files.SUMMARY).exists()
        assert (config.run_dir / lock.NAME).read_bytes() == b""


@pytest.mark.slow
def test_a_worker_that_does_not_see_the_folder_sends_it_back(tmp_path):
    """Saved where it was interrupted, and continued from there."""
    out, home = tmp_path / "runs", tmp_path / "home"
    out.mkdir()
    home.mkdir()
    # Long enough that it is stopped before its end.
    (config,), (other,) = (
        plans.of_methods({**GIVEN, "max_time": 12.0}, METHODS[1:], 1, place)
        for place in (out, tmp_path / "alone")
    )
    blind = {"HIDDEN": out, "TMPDIR": home}
    with (
        scheduler(tmp_path) as address,
        started_worker(address, "--nthreads=1", "--preload=tests.blind_worker", **blind),
    ):
        with (
            campaign.Workers(scheduler=address, out=out) as workers,
            pytest.raises(ConfigError, match=rf"worker \S+ does not see out={out}"),
        ):
            campaign.run_all([config], workers)
        assert list(out.iterdir()) == []
        with campaign.Workers(scheduler=address, out=out, send_back=True) as workers:
            asked = _Asked(lambda: len(list(home.glob("*/*/checkpoints/*/record.json"))) > 2)
            with pytest.raises(InterruptedRunError, match="0 of 1 runs are done"):
                campaign.run_all([config], workers, interruption=asked)
            before = saved(config)
            assert not (config.run_dir / files.SUMMARY).exists()
            campaign.run_all([config], workers, notify=lambda line: None)
    campaign.run_all([other], notify=lambda line: None)
    assert_same([config], [other])
    after = saved(config)
    assert 2 < len(before) < len(after)
    assert before == {version: after[version] for version in before}
    assert files.read_json(config.run_dir / files.CONFIG)["workdir"] == str(config.run_dir)
    assert [path.name for path in out.iterdir()] == [config.run_dir.name]


@pytest.mark.slow
def test_a_lost_worker_that_does_not_see_the_folder(tmp_path, reference):
    """Another one goes on with its run from what the scheduler holds."""
    out, home = tmp_path / "runs", tmp_path / "home"
    out.mkdir()
    home.mkdir()
    (config,), before = planned(out, METHODS[1:]), {}

    def begun():
        places = home.glob(f"*/{config.run_dir.name}")
        return [saved(dataclasses.replace(config, workdir=str(place))) for place in places]

    blind = {"HIDDEN": out, "TMPDIR": home}
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(scheduler(tmp_path))
        arguments = (address, "--nthreads=1", "--preload=tests.blind_worker")
        first = stack.enter_context(started_worker(*arguments, **blind))

        def kill():
            until(lambda: any(len(found) > 3 for found in begun()))
            first.kill()
            first.wait()
            before.update(*begun())
            shutil.rmtree(home)  # as if its machine were gone
            home.mkdir()
            stack.enter_context(started_worker(*arguments, **blind))

        workers = stack.enter_context(campaign.Workers(scheduler=address, out=out, send_back=True))
        killer = threading.Thread(target=kill)
        killer.start()
        campaign.run_all([config], workers, notify=lambda line: None)
        killer.join()
    assert_same([config], reference[1:])
    after = saved(config)
    assert len(after) > len(before)
    # The last one may not have been sent yet.
    assert all(before[version] == after[version] for version in sorted(before)[:-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("threads", "installed", "message"),
    [
        (1, "9.9.9", "has jax 9.9.9, but"),
        (2, None, "has 2 threads and would do as many runs at once; start it with --nthreads 1"),
    ],
)
def test_a_worker_that_is_not_as_it_must_be(tmp_path, threads, installed, message):
    """Of jax it finds another version than is installed here."""
    if installed:
        fake = tmp_path / f"jax-{installed}.dist-info"
        fake.mkdir()
        (fake / "METADATA").write_text(f"Name: jax\nVersion: {installed}\n")
    with (
        scheduler(tmp_path) as address,
        started_worker(address, f"--nthreads={threads}", PYTHONPATH=tmp_path),
        campaign.Workers(scheduler=address, out=tmp_path) as workers,
        pytest.raises(ConfigError, match=rf"scheduler={address}: worker \S+ {message}"),
    ):
        campaign.run_all(planned(tmp_path), workers)


def test_no_scheduler(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "ANSWER", 0.1)
    with (
        campaign.Workers(scheduler="tcp://127.0.0.1:1", out=tmp_path) as workers,
        pytest.raises(ConfigError, match=r"scheduler=tcp://127.0.0.1:1: cannot be reached \(.*\)$"),
    ):
        campaign.run_all(planned(tmp_path), workers)


def die(task):
    """In place of a run: what the kernel does when memory is out."""
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_run_that_kills_its_workers_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "work", die)
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1}),
        campaign.Workers(jobs=2) as workers,
        pytest.raises(
            cluster.LostWorkerError, match="fedbuff_seed0: 2 workers have died of it, killed or out"
        ),
    ):
        campaign.run_all(planned(tmp_path, METHODS[:1]), workers)


def test_a_comparison_in_this_process_does_without_dask():
    """Which takes a second to import, and threads."""
    code = "import sys; from fedrevive_jax.comparison import campaign; campaign.run_all([]); "
    code += "assert not {'dask', 'distributed'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_a_worker_must_be():
    assert worker.difference(HERE, HERE) == ""
    other = HERE._replace(versions={**HERE.versions, "flax": ""})
    assert re.match("has flax not, but", worker.difference(other, HERE))
    wrong = worker.difference(HERE._replace(platform="gpu"), HERE)
    assert wrong == "computes on gpu, others on cpu"
    assert all(HERE.versions.values())


def warn(task):
    with worker._heard(distributed.get_worker(), task):
        print("progress", file=sys.stderr)
        logging.getLogger("fedrevive_jax.running.recorder").info("a step")
        logging.getLogger("fedrevive_jax.running.recorder").warning("the loss guard")


def test_warnings_of_a_run_are_told_with_its_name_and_nothing_else(monkeypatch, caplog, capfd):
    """The worker is a thread of this process, whose own words it must not hear."""
    monkeypatch.setattr(cluster, "_LOG", logging.getLogger("told"))
    config = resolve("digits", "fedbuff", seed=3)
    monkeypatch.setattr(worker, "work", lambda task: warn(task) or worker.Reply())
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
        ) as threads,
        distributed.Client(threads) as client,
    ):
        cluster.Cluster(client, HERE, None, False).run([config], False, lambda _: None, None)
    told = [record.getMessage() for record in caplog.records if record.name == "told"]
    assert told == ["digits_fedbuff_seed3: the loss guard"]
    assert "progress" not in capfd.readouterr().err


BEGUN, OVER = threading.Semaphore(0), threading.Event()


def save_in_a_way_of_its_own(task):
    """In place of a run: it sends its folder, and is told to stop. One replies at once, one with an
    error, one for too long not at all."""
    name = task.config.run_dir.name
    folder = task.config.run_dir.parents[1] / "worker" / name
    folder.mkdir(parents=True)
    files.write_json(folder / files.CONFIG, {**task.config.as_dict(), "workdir": str(folder)})
    (folder / "state").write_text("sent before")
    distributed.Variable(task.kept).set(parcels.pack(folder))
    BEGUN.release()
    distributed.Event(task.stop).wait()
    if name == "wrong":
        return worker.Reply(UserError("the disk is full"))
    if name == "slow":
        OVER.wait()
    (folder / "state").write_text("at the end")
    return worker.Reply(stopped="interrupted", parcel=parcels.pack(folder))


def test_a_run_that_saves_for_too_long_costs_no_other(tmp_path, monkeypatch):
    """What the others reply is taken, and of its own what it sent before. The scheduler keeps
    nothing."""
    (tmp_path / "out").mkdir()
    configs = [
        resolve("digits", "fedbuff", workdir=str(tmp_path / "out" / name))
        for name in ("quick", "wrong", "slow")
    ]
    begun = []

    def all_have_begun():
        while BEGUN.acquire(blocking=False):
            begun.append(1)
        return len(begun) == len(configs)

    asked = _Asked(all_have_begun)
    asked.grace = 8.0
    monkeypatch.setattr(worker, "work", save_in_a_way_of_its_own)
    OVER.clear()
    with (
        distributed.LocalCluster(
            n_workers=3, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
        ) as threads,
        distributed.Client(threads) as client,
    ):
        try:
            with pytest.raises(InterruptedRunError):
                cluster.Cluster(client, HERE, None, True).run(configs, False, print, asked)
        finally:
            OVER.set()
        until(lambda: not threads.scheduler.extensions["variables"].variables)
    held = {config.run_dir.name: (config.run_dir / "state").read_text() for config in configs}
    assert held == {"quick": "at the end", "wrong": "sent before", "slow": "sent before"}


def test_a_scheduler_that_is_gone_is_one_line(tmp_path, monkeypatch):
    """Also where what it held would have been taken."""
    (tmp_path / "out").mkdir()
    config = resolve("digits", "fedbuff", workdir=str(tmp_path / "out" / "slow"))
    monkeypatch.setattr(worker, "work", save_in_a_way_of_its_own)
    OVER.clear()
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
        ) as threads,
        distributed.Client(threads) as client,
    ):

        def gone():
            if BEGUN.acquire(blocking=False):
                OVER.set()
                threads.sync(threads.scheduler.close)
            return False

        with pytest.raises(cluster.LostSchedulerError, match="is gone; the same command continues"):
            cluster.Cluster(client, HERE, None, True).run([config], False, print, _Asked(gone))


# --- parcels --------------------------------------------------------------------------------------


@pytest.fixture
def recorded(tmp_path):
    """A run's configuration, and its folder as a worker has it."""
    config = resolve("digits", "fedbuff", workdir=str(tmp_path / "out" / "run"))
    (tmp_path / "out").mkdir()
    folder = tmp_path / "worker"
    (folder / "checkpoints").mkdir(parents=True)
    files.write_json(folder / files.CONFIG, {**config.as_dict(), "workdir": str(folder)})
    (folder / "checkpoints" / "state.npz").write_bytes(bytes(range(256)))
    (folder / lock.NAME).write_text("of the worker")
    (folder / "half.partial").write_text("half")
    return config, folder


def test_a_parcel_arrives_whole(recorded):
    config, folder = recorded
    parcels.deliver(parcels.pack(folder), config)
    arrived = {p.relative_to(config.run_dir).as_posix() for p in config.run_dir.rglob("*")}
    assert arrived == {"config.json", "checkpoints", "checkpoints/state.npz"}
    assert (config.run_dir / "checkpoints" / "state.npz").read_bytes() == bytes(range(256))
    assert files.read_json(config.run_dir / files.CONFIG) == config.as_dict()
    # A link means nothing elsewhere.
    (folder / "log").symlink_to("/var/log/elsewhere")
    (folder / "state").symlink_to("checkpoints/state.npz")
    # What was there is replaced as a whole, and nothing is left beside it.
    (config.run_dir / "old").write_text("")
    parcels.deliver(parcels.pack(folder), config)
    assert not (config.run_dir / "old").exists()
    assert [path.name for path in config.run_dir.parent.iterdir()] == ["run"]
    assert not list(config.run_dir.glob("log")) + list(config.run_dir.glob("state"))


def test_a_delivery_that_died_in_the_midst_loses_nothing(recorded):
    """Between its two renames: what was there lies aside."""
    config, folder = recorded
    parcels.deliver(parcels.pack(folder), config)
    (config.run_dir / "mark").write_text("")
    config.run_dir.rename(config.run_dir.with_name("run.leaving"))
    parcels.mend(config.run_dir)
    assert (config.run_dir / "mark").exists()
    config.run_dir.rename(config.run_dir.with_name("run.leaving"))
    damaged = parcels.pack(folder)._replace(sha256="")
    with pytest.raises(UserError, match="was damaged"):
        parcels.deliver(damaged, config)
    assert (config.run_dir / "mark").exists()


def test_a_parcel_that_is_wrong_does_not_arrive(recorded):
    config, folder = recorded
    good = parcels.pack(folder)
    parcels.deliver(good, config)
    flipped = bytes([good.archive[600] ^ 1])
    damaged = good._replace(archive=good.archive[:600] + flipped + good.archive[601:])
    other = dataclasses.replace(config, seed=config.seed + 1)
    for parcel, wanted, message in (
        (damaged, config, "was damaged on the way"),
        (good, other, "sent another run"),
    ):
        with pytest.raises(UserError, match=message):
            parcels.deliver(parcel, wanted)
    with lock.exclusive(config.run_dir), pytest.raises(ConfigError, match="is in use by"):
        parcels.deliver(good, config)
    assert files.read_json(config.run_dir / files.CONFIG) == config.as_dict()
    with pytest.raises(ConfigError, match="cannot be written"):
        parcels.deliver(good, dataclasses.replace(config, workdir="/dev/null/run"))


def test_a_run_that_diverged_is_done(recorded):
    """Its mark comes back with its folder."""
    config, folder = recorded
    files.write_json(folder / runs.FAILED, {"by": "DivergenceError", "message": "diverged"})
    parcels.deliver(parcels.pack(folder), config)
    assert runs.line(config) == "run: diverged"
