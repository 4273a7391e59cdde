"""The record of a run, continuing it exactly, and evaluating it elsewhere."""

import dataclasses
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

from fedrevive_jax import data
from fedrevive_jax.data import tokens
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.presets import resolve
from fedrevive_jax.record import derived, files, reading
from fedrevive_jax.record.checkpoint import CheckpointError, Checkpoints
from fedrevive_jax.record.files import RecordError
from fedrevive_jax.running import recorder, restore, runner
from fedrevive_jax.simulation.simulator import Simulation
from tests import killed_run
from tests.toys import small

RUN = {"max_time": 5.0, "checkpoint_every": 7, "eval_every": 4}


def config_in(folder, method="fedrevive", **kwargs):
    return small(method, **{**RUN, "workdir": str(folder), **kwargs})


def finish(config, **kwargs):
    return runner.run(config, keep_record=True, **kwargs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run and its folder."""
    config = config_in(tmp_path_factory.mktemp("whole") / "run")
    return config, finish(config)


def final_state(config):
    """All arrays of the newest checkpoint."""
    simulation = Simulation(config)
    checkpoints = Checkpoints(config.run_dir, read_only=True)
    saved = checkpoints.load(
        checkpoints.steps()[-1],
        simulation.server.params,
        lambda saved: simulation.shapes(saved["simulation"]),
    )
    return saved.record["simulation"], (saved.params, saved.arrays)


def metrics_without_wall(config):
    rows = files.read_rows(config.run_dir / files.METRICS)
    return [{k: v for k, v in row.items() if k != "wall_seconds"} for row in rows]


def test_the_record(whole):
    config, result = whole
    folder, clock = config.run_dir, Simulation(config).schedule
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json", "metrics.jsonl", "arrivals.jsonl", "summary.json", "tensorboard",
        "clients.npz", "origin.json", "curves.png", "synthetic.png", "revival.png", "report.html",
        "checkpoints", "live", "run.lock",
    }  # fmt: skip
    assert reading.read_config(folder) == runner.settle(config)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == result.summary
    assert summary["versions"] == summary["arrivals"] == clock.num_arrivals
    assert summary["staleness_mean"] == pytest.approx(clock.staleness.mean())

    arrivals = files.read_rows(folder / files.ARRIVALS)
    assert [row["index"] for row in arrivals] == list(range(clock.num_arrivals))
    for row in arrivals:
        assert set(row) == {
            "index", "time", "start", "client", "base_version", "version", "staleness", "beta",
            "accepted", "rejected", "loss",
        }  # fmt: skip
        assert row["staleness"] == row["version"] - row["base_version"]
        assert row["accepted"] is True
    assert any(row["beta"] > 0 for row in arrivals)
    assert [row["start"] for row in arrivals] == clock.start[clock.job].tolist()

    metrics = files.read_rows(folder / files.METRICS)
    evaluations = [row for row in metrics if row["kind"] == "evaluation"]
    planned = {*range(0, clock.num_versions, 4), clock.num_versions}
    assert [row["version"] for row in evaluations] == sorted(planned)
    assert evaluations[-1]["accuracy"] == summary["final_accuracy"]
    assert max(row["accuracy"] for row in evaluations) == summary["best_accuracy"]
    pools = [row for row in metrics if row["kind"] == "pool"]
    assert [row["version"] for row in pools] == [row["version"] for row in evaluations]
    assert sum(pools[0]["counts"]) == 0 < sum(pools[-1]["counts"]) <= config.pool_size
    losses = [row for row in metrics if row["kind"] == "dfkd"]
    synthesised = [row["version"] for row in losses if row["synthesis"] is not None]
    assert synthesised == list(range(4, clock.num_versions, 2))
    distilled = {row["version"] for row in losses if row["distillation"] is not None}
    assert distilled == {row["version"] for row in arrivals if row["beta"] > 0}
    assert summary["revived"] == sum(row["beta"] > 0 for row in arrivals) / len(arrivals)
    judged = [row["agreement"] for row in losses if row["synthesis"] is not None]
    assert all(0 <= share <= 1 for share in judged)
    assert all(
        row["distilled_norm"] > 0 and abs(row["distilled_cosine"]) <= 1 + 1e-6
        for row in losses
        if row["distillation"] is not None
    )
    events = list((folder / "tensorboard").iterdir())
    assert sum(path.stat().st_size for path in events) > 0


def assert_same_end(config, reference):
    """Bit for bit, rows included; but for the time that it took."""
    plain, state = final_state(config)
    expected_plain, expected_state = final_state(reference)
    assert plain == expected_plain
    for a, b in zip(*map(jax.tree.leaves, (state, expected_state)), strict=True):
        np.testing.assert_array_equal(a, b)
    arrivals = [(c.run_dir / files.ARRIVALS).read_bytes() for c in (config, reference)]
    assert arrivals[0] == arrivals[1]
    assert metrics_without_wall(config) == metrics_without_wall(reference)


KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "signals", "settings"),
    [
        ("fedrevive", (KILL, TERM, INT, KILL), {}),
        (
            "fedbuff",
            (KILL, INT, KILL, TERM),
            {"max_time": 8.0, "server_optimizer": "adam", "server_lr": 0.01},
        ),
    ],
)
def test_killed_and_continued_equals_uninterrupted(whole, tmp_path, method, signals, settings):
    """The same command again and again, each time ended at a random moment; the same end.

    Moments are changes of files, inside a save, too, arrivals and evaluations. After SIGKILL the
    run is where it was saved last; SIGTERM and SIGINT save.
    """
    if method == "fedrevive":
        reference = whole[0]
    else:
        reference = config_in(tmp_path / "whole", method, **settings)
        assert reference.buffer_size > 1
        finish(reference)
    config = dataclasses.replace(reference, workdir=str(tmp_path / "killed"))
    flags = [*killed_run.as_flags(runner.settle(config)), "--grace=300"]
    rng = random.Random(method)
    saved = interrupted = 0
    for number in signals:
        ended = killed_run.start(rng.randrange(1, 45), number, *flags)
        if (config.run_dir / files.SUMMARY).exists():
            break  # it was done before
        interrupted += 1
        if number is KILL:
            assert ended.returncode == -KILL, ended.stderr
        else:
            assert ended.returncode == 128 + number, ended.stderr
            saved = int(ended.stderr.partition("interrupted: saved at version ")[2])
        steps = Checkpoints(config.run_dir, read_only=True).steps()
        assert max(steps, default=0) >= saved
        rows = files.read_rows(config.run_dir / files.ARRIVALS)
        assert [row["index"] for row in rows] == list(range(len(rows)))
    assert interrupted >= 3
    done = (config.run_dir / files.SUMMARY).exists()
    result = finish(config)
    assert done or (result.resumed_version or 0) >= saved
    assert_same_end(config, reference)


def test_a_momentum_is_part_of_what_is_continued(tmp_path, monkeypatch):
    reference = config_in(tmp_path / "whole", "dd_fedrevive", server_optimizer="momentum")
    finish(reference)
    config = dataclasses.replace(reference, workdir=str(tmp_path / "stopped"))
    monkeypatch.setattr(Simulation, "advance", _interrupt_at(10))
    with pytest.raises(KeyboardInterrupt):
        finish(config)
    monkeypatch.undo()
    assert finish(config).resumed_version == 7
    assert_same_end(config, reference)


def test_a_corrupt_checkpoint_is_passed_over_and_the_end_is_the_same(whole, tmp_path, caplog):
    config = dataclasses.replace(whole[0], workdir=str(tmp_path / "run"))
    shutil.copytree(whole[0].run_dir, config.run_dir)
    (config.run_dir / files.SUMMARY).unlink()
    older, newest = Checkpoints(config.run_dir, read_only=True).steps()
    state = config.run_dir / "checkpoints" / str(newest) / "state.npz"
    raw = bytearray(state.read_bytes())
    raw[len(raw) // 2] ^= 1
    state.write_bytes(raw)
    assert reading.read_params(config.run_dir, Simulation(config).model)[0] == newest
    assert finish(config).resumed_version == older
    assert f"checkpoint {newest} is corrupt (the checksum of state.npz failed)" in caplog.text
    assert_same_end(config, whole[0])
    # An evaluation reads the global model alone, and guards that.
    next((config.run_dir / "checkpoints" / str(newest) / "params").rglob("*/d/*")).unlink()
    model = Simulation(config).model
    assert reading.read_params(config.run_dir, model)[0] == older
    with pytest.raises(ConfigError, match=rf"checkpoint {newest} is corrupt \(.* is missing\)"):
        reading.read_params(config.run_dir, model, step=newest)


def test_small_checkpoints_continue_with_jobs_that_start_again(tmp_path, monkeypatch, caplog):
    """The plan holds but for what the restarted jobs start from; rows and record agree with it."""
    config = config_in(tmp_path / "run", "fedbuff", checkpoint_mode="params", buffer_size=1)
    plan = Simulation(config).schedule
    for arrival in (10, 16):
        monkeypatch.setattr(Simulation, "advance", _interrupt_at(arrival))
        with pytest.raises(KeyboardInterrupt):
            finish(config)
        monkeypatch.undo()
    assert not list((config.run_dir / "live").iterdir())
    result = finish(config)
    assert result.resumed_version == 14
    assert "with checkpoint_mode=params: not exact" in caplog.text
    assert result.summary["jobs_restarted"] == 2 * config.concurrency

    rows = files.read_rows(config.run_dir / files.ARRIVALS)
    assert [row["index"] for row in rows] == list(range(plan.num_arrivals))
    assert [row["client"] for row in rows] == plan.client[plan.job].tolist()
    assert [row["time"] for row in rows] == plan.time.tolist()
    for row, job in zip(rows, plan.job, strict=True):
        # In flight at version 7 or 14: handed out before, arriving after.
        restarts = [v for v in (7, 14) if plan.base_version[job] <= v <= row["index"]]
        base = restarts[-1] if restarts else plan.base_version[job]
        assert (row["base_version"], row["version"]) == (base, row["index"])
        assert row["staleness"] == row["version"] - base
    assert result.summary["staleness_mean"] == np.mean([row["staleness"] for row in rows])


@pytest.mark.parametrize("what", ["removed", "full"])
def test_a_folder_that_fails_under_a_run_ends_it_with_one_line(tmp_path, monkeypatch, what):
    config = config_in(tmp_path / "run", "fedbuff", buffer_size=1)
    advance = Simulation.advance

    def fail(self):
        if self.position == 9:
            if what == "removed":
                shutil.rmtree(config.run_dir)
            else:
                resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
        return advance(self)

    monkeypatch.setattr(Simulation, "advance", fail)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises((RecordError, CheckpointError)) as raised:
            finish(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    message = str(raised.value)
    assert message.startswith(f"workdir={config.run_dir}: ")
    assert len(message.splitlines()) == 1
    if what == "removed":
        # The checkpoint of version 7 may have been on its way, and made the folder anew.
        assert message.endswith(("there is none on disk", "the newest on disk is of version 7"))
        return
    # The checkpoint of version 7 may have been on its way; what is told of it is true.
    version = (
        7 if message.endswith("(File too large); the newest on disk is of version 7") else None
    )
    assert version or message.endswith("(File too large); there is none on disk")
    monkeypatch.undo()
    assert finish(config).resumed_version == version


def test_a_finished_run_is_left_alone(whole):
    config, result = whole
    before = {p: p.stat().st_mtime_ns for p in config.run_dir.rglob("*") if p.is_file()}
    assert runner.is_finished(config)
    again = finish(config)
    assert again.summary == result.summary
    assert again.evaluations == result.evaluations
    for a, b in zip(*map(jax.tree.leaves, (again.params, result.params)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert before == {p: p.stat().st_mtime_ns for p in config.run_dir.rglob("*") if p.is_file()}


def test_another_configuration_is_refused_and_shown(whole):
    config, _ = whole
    other = dataclasses.replace(config, server_lr=0.7, seed=5)
    with pytest.raises(ConfigError, match=r"`seed`: 0 in the record, 5 now; `server_lr`: .*0\.7"):
        finish(other)
    # Where the data and the folder lie is no part of what is computed.
    assert runner.is_finished(dataclasses.replace(config, data_dir="/elsewhere"))


def test_overwrite_starts_afresh(tmp_path):
    config = config_in(tmp_path / "run", "fedbuff", max_time=2.0)
    finish(config)
    (config.run_dir / "notes.txt").write_text("of the old run")
    other = dataclasses.replace(config, seed=3)
    assert finish(other, overwrite=True).summary["seed"] == 3
    assert not (config.run_dir / "notes.txt").exists()
    assert runner.is_finished(other)


def test_a_foreign_folder_is_never_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    config = config_in(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"holds thesis\.tex but no config\.json"):
            finish(config, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_damaged_configuration_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        finish(config_in(tmp_path))


def test_a_run_without_a_record_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = runner.run(small("fedbuff", max_time=2.0))
    assert 0 <= result.summary["final_accuracy"] <= 1
    assert list(tmp_path.iterdir()) == []


def test_a_changed_plan_is_refused(tmp_path):
    """The trace that a run was planned from has changed since its checkpoint."""
    trace = tmp_path / "trace.csv"
    trace.write_text("download,train,upload\n0.1,1.0,0.2\n0.1,2.0,0.3\n")
    config = config_in(tmp_path / "run", "fedbuff", delays="trace", delay_trace=str(trace))
    finish(config)
    (config.run_dir / files.SUMMARY).unlink()
    trace.write_text("download,train,upload\n0.1,1.5,0.2\n0.1,2.0,0.3\n")
    with pytest.raises(ConfigError, match="holds a run on another file for `delay_trace`"):
        finish(config)


def test_rows_that_are_gone_are_noticed(tmp_path):
    config = config_in(tmp_path / "run", "fedbuff")
    finish(config)
    (config.run_dir / files.SUMMARY).unlink()
    (config.run_dir / files.METRICS).unlink()
    with pytest.raises(ConfigError, match="no checkpoint is whole"):
        finish(config)


def test_rows_that_have_changed_are_noticed(tmp_path, caplog):
    """One digit of a row is another: the run continues from before that row, and writes it anew."""
    config = config_in(tmp_path / "run", "fedbuff", checkpoint_every=1, eval_every=1)
    finish(config)
    (config.run_dir / files.SUMMARY).unlink()
    path = config.run_dir / files.ARRIVALS
    whole = path.read_bytes()
    path.write_bytes(whole[:-10] + (b"1" if whole[-10:-9] != b"1" else b"2") + whole[-9:])
    finish(config)
    assert "corrupt (the checksum of arrivals.jsonl failed)" in caplog.text
    assert path.read_bytes() == whole
    path.write_bytes(whole.replace(b"0.", b"1.", 1))  # in the first row, before every checkpoint
    (config.run_dir / files.SUMMARY).unlink()
    with pytest.raises(ConfigError, match="no checkpoint is whole"):
        finish(config)


def test_divergence_ends_the_run_with_a_message_and_a_good_checkpoint(tmp_path):
    """A rate beyond all bounds: losses overflow once the first update is in."""
    config = config_in(
        tmp_path / "run",
        "fedbuff",
        buffer_size=1,
        server_lr=1e30,
        checkpoint_every=1,
        max_time=20.0,
    )
    with pytest.raises(runner.DivergenceError, match="the last 10 training losses"):
        finish(config)
    assert not (config.run_dir / files.SUMMARY).exists()
    rows = files.read_rows(config.run_dir / files.ARRIVALS)
    assert [row["loss"] for row in rows[-10:]] == [None] * 10
    assert not any(row["accepted"] for row in rows[-10:])
    version, params = reading.read_params(config.run_dir, Simulation(config).model)
    assert version > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_a_digits_run_does_not_import_tfds(tmp_path):
    code = (
        "import sys; from fedrevive_jax.running import runner;"
        "from tests.test_simulator import small; runner.run(small('fedbuff', max_time=1.5));"
        "assert not {'tensorflow_datasets', 'tensorflow', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_without_a_version_is_refused(tmp_path):
    config = config_in(tmp_path / "run", "fedbuff", max_time=0.05)
    with pytest.raises(ConfigError, match=r"^max_time=0.05: must be long enough for a version"):
        finish(config)
    assert not (tmp_path / "run").exists()


def test_rows_are_cut_to_what_counts(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = files.Rows(path)
    rows.append({"a": 1, "b": float("nan")})
    size = rows.flush()["size"]
    rows.append({"a": 2, "b": 0.5})
    rows.close()
    with path.open("ab") as stream:
        stream.write(b'{"a": 3, "b')  # a row that was cut by a crash
    assert files.read_rows(path) == [{"a": 1, "b": None}, {"a": 2, "b": 0.5}]
    files.Rows(path, size).close()
    assert files.read_rows(path) == [{"a": 1, "b": None}]
    path.write_bytes(b'{"a": 1}\n{"a": \x00}\n')
    with pytest.raises(ConfigError, match=r"rows\.jsonl line 2 is damaged"):
        files.read_rows(path)


# --- what a run starts from and keeps -------------------------------------------------------------


def test_client_tables_are_kept_and_used(whole):
    """Other tables make another plan."""
    config, _ = whole
    simulation, kept = Simulation(config), derived.read(config.run_dir)
    np.testing.assert_array_equal(kept.shards.indices, simulation.derived.shards.indices)
    np.testing.assert_array_equal(kept.shards.offsets, simulation.derived.shards.offsets)
    swapped = dataclasses.replace(kept.shards, indices=kept.shards.indices[::-1].copy())
    other = Simulation(config, derived=derived.Derived(shards=swapped))
    assert other.fingerprint != simulation.fingerprint


def test_other_data_make_another_plan():
    config = small("fedbuff")
    simulation = Simulation(config)
    dataset = simulation.dataset
    splits = {**dataset.splits, "test": dataset.splits["test"][:-1]}
    for change in (
        {"splits": splits},
        {"preprocessing": dataclasses.replace(dataset.preprocessing, flip=True)},
        {"samples": 255 - dataset.samples},
        {"labels": dataset.labels[::-1].copy()},
    ):
        other = Simulation(config, dataset=dataclasses.replace(dataset, **change))
        assert other.fingerprint != simulation.fingerprint, change.keys()
    assert Simulation(config, dataset=dataset).fingerprint == simulation.fingerprint


def test_another_input_file_is_another_run(whole):
    config, _ = whole
    other = dataclasses.replace(config, pretrained=str(config.run_dir))
    with pytest.raises(ConfigError, match="`pretrained`: '' in the record"):
        runner.is_finished(other)
    with pytest.raises(ConfigError, match="did not start from such weights"):
        restore.evaluate_checkpoint(config.run_dir, t5_weights="/any")


def test_a_run_without_a_checkpoint_starts_from_the_data_as_they_are(tmp_path, monkeypatch):
    """Who holds what is kept from the start, but read with a checkpoint only."""
    config = config_in(tmp_path / "run", "fedbuff", checkpoint_every=10_000)
    monkeypatch.setattr(Simulation, "advance", _interrupt_at(3))
    with pytest.raises(KeyboardInterrupt):
        finish(config)
    monkeypatch.undo()
    kept = derived.read(config.run_dir)
    assert kept.origin == {"start": "random"}
    shards = kept.shards
    stale = dataclasses.replace(shards, indices=shards.indices[::-1].copy())
    derived.write(config.run_dir, kept._replace(shards=stale), kept.sources)
    (config.run_dir / derived.TOKENIZER).write_text("of other data")
    finish(config)
    np.testing.assert_array_equal(derived.read(config.run_dir).shards.indices, shards.indices)


def test_a_checkpoint_of_something_else_is_named(tmp_path):
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    model = Simulation(small("fedbuff")).model
    with pytest.raises(ConfigError, match="no checkpoint is whole; corrupt: 5"):
        reading.read_params(tmp_path, model)
    with pytest.raises(
        ConfigError, match=r"checkpoint 5 is corrupt \(record.json or its checksum is missing\)"
    ):
        reading.read_params(tmp_path, model, step=5)


def test_a_split_without_samples_is_named():
    dataset = data.load(resolve("digits"))
    splits = {**dataset.splits, "validation": dataset.splits["validation"][:0]}
    empty = dataclasses.replace(dataset, splits=splits)
    with pytest.raises(ConfigError, match="data set digits: its split 'validation' holds no"):
        Simulation(small("fedbuff", eval_split="validation"), empty)


def test_a_run_starts_from_an_earlier_model(whole, tmp_path):
    config, result = whole
    started = config_in(tmp_path / "run", "fedbuff", pretrained=str(config.run_dir), max_time=1.0)
    first = finish(started)
    assert first.evaluations[0]["loss"] == result.evaluations[-1]["loss"]
    version = result.summary["versions"]
    assert first.summary["start"] == f"version {version} of {config.run_dir}"
    assert result.summary["start"] == "random"


def test_an_earlier_model_that_does_not_fit_is_named(whole, tmp_path):
    config, _ = whole
    for changes, message in (
        ({"model_width": 5}, rf"pretrained={config.run_dir}: its parameter conv1/bias is \["),
        ({"model": "resnet18", "model_width": 2}, "this model's is absent"),
        ({"pretrained": str(tmp_path)}, f"pretrained={tmp_path}: holds no folder checkpoints"),
    ):
        with pytest.raises(ConfigError, match=message):
            Simulation(small("fedbuff", **{"pretrained": str(config.run_dir), **changes}))


@pytest.mark.slow
def test_a_text_run_continues_exactly_and_keeps_its_tokenizer(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for split, count in (("train", 120), ("test", 30)):
        words = [rng.choice([f"w{i % 3}{j}" for j in range(6)], 9) for i in range(count)]
        rows = [{"label": f"c{i % 3}", "text": " ".join(own)} for i, own in enumerate(words)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def text_config(name):
        return resolve(
            "text_folder", "fedrevive", preset_scale="small", data_dir=str(tmp_path),
            workdir=str(tmp_path / name), max_time=3, text_length=8, checkpoint_every=8,
            model_width=8, vocabulary_size=64,
        )  # fmt: skip

    whole_run = finish(text_config("whole"))
    assert whole_run.summary["tokenizer"].startswith("trained on the training split, ")
    interrupted = text_config("interrupted")
    monkeypatch.setattr(Simulation, "advance", _interrupt_at(10))
    with pytest.raises(KeyboardInterrupt):
        finish(interrupted)
    monkeypatch.undo()
    finish(interrupted)
    for mine, theirs in zip(
        *(jax.tree.leaves(final_state(text_config(n))) for n in ("whole", "interrupted")),
        strict=True,
    ):
        np.testing.assert_array_equal(mine, theirs)
    # Evaluation reads the kept tokenizer; it trains none.
    monkeypatch.setattr(tokens, "train", None)
    figures = restore.evaluate_checkpoint(interrupted.run_dir)
    assert figures["accuracy"] == whole_run.summary["final_accuracy"]
    kept = derived.read(interrupted.run_dir).tokenizer
    assert kept == derived.read(text_config("whole").run_dir).tokenizer != ""


def _interrupt_at(arrival):
    advance = Simulation.advance

    def stop(self):
        if self.position == arrival:
            raise KeyboardInterrupt
        return advance(self)

    return stop


def test_evaluations_by_simulated_time():
    """Version 0, the first version after each full unit of time, and the last one."""
    result = runner.run(small("fedbuff", eval_interval=1.0))
    times = [row["time"] for row in result.evaluations]
    assert times[0] == 0.0
    assert np.floor(times[1:-1]).tolist() == [1, 2, 3, 4, 5]


def test_what_has_come_is_saved_while_nothing_else_comes(tmp_path, monkeypatch):
    """By a clock that stands still but for a long pause after the third arrival."""
    config = config_in(tmp_path / "run", "fedbuff", buffer_size=1, checkpoint_every=1000)
    config = dataclasses.replace(config, checkpoint_keep=1000)
    clock, paused = [0.0], []
    still = types.SimpleNamespace(monotonic=lambda: clock[0], perf_counter=time.perf_counter)
    monkeypatch.setattr(recorder, "time", still)

    class Pausing(Simulation):
        def advance(self):
            if self.position == 3 and not paused:
                paused.append(Checkpoints(config.run_dir, read_only=True).steps())
                clock[0] += 60
                return None
            return super().advance()

    finish(config, make=Pausing, save_seconds=50.0)
    assert paused == [[]]
    assert Checkpoints(config.run_dir, read_only=True).steps()[0] == 3
