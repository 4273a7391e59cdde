"""Trackers get each row once, however often a run is continued, and none of them ends a run."""

import dataclasses
import json
import struct

import chex
import pytest

from fedrevive_jax.errors import ConfigError
from fedrevive_jax.presets import resolve
from fedrevive_jax.record import trackers
from fedrevive_jax.record.files import read_json
from fedrevive_jax.running import runner
from tests.toys import small

ROWS = [
    {"kind": "evaluation", "version": 0, "time": 0.0, "accuracy": 0.1},
    {"kind": "evaluation", "version": 5, "time": 1.0, "accuracy": 0.2},
    {"kind": "dfkd", "version": 5, "time": 1.5, "distillation": 0.7, "one_hot": float("nan")},
    {"kind": "evaluation", "version": 9, "time": 2.0, "accuracy": 0.3},
]


@pytest.fixture
def config(tmp_path):
    return resolve("digits", "fedbuff", workdir=str(tmp_path / "run"))


def followed(config, name, *parts):
    """A run that is opened once for each part, and told those of its rows."""
    config.run_dir.mkdir(exist_ok=True)
    for number, part in enumerate(parts):
        opened = trackers.Trackers([name], config.run_dir, config)
        for row in part:
            opened.add(row)
        opened.flush()
        opened.close({"final_accuracy": 0.3} if number == len(parts) - 1 else None)


class Listed:
    """A tracker that keeps what it gets, or fails from a row on."""

    got, fails_at, id = [], None, "a"

    def add(self, values, version):
        if len(self.got) == self.fails_at:
            raise RuntimeError("the disk is full\nand more")
        self.got.append((version, dict(values)))

    def flush(self):
        pass

    def close(self, summary):
        self.got.append(summary)


@pytest.fixture
def listed(monkeypatch):
    from fedrevive_jax.record.trackers import mlflow

    tracker = Listed()
    tracker.got = []
    monkeypatch.setattr(mlflow, "create", lambda run: tracker)
    return tracker


def test_each_row_is_told_once(config, listed):
    """Taken back by two rows, which come again; the third of a run that went on."""
    followed(config, "mlflow", ROWS[:3], ROWS[:2], ROWS)
    assert listed.got == [
        (0, {"time": 0.0, "accuracy": 0.1}),
        (5, {"time": 1.0, "accuracy": 0.2}),
        (5, {"dfkd/time": 1.5, "dfkd/distillation": 0.7}),
        None,
        None,
        (9, {"time": 2.0, "accuracy": 0.3}),
        {"final_accuracy": 0.3},
    ]


def test_a_tracker_that_fails_is_left_out(config, listed, caplog):
    listed.fails_at = 1
    followed(config, "mlflow", ROWS)
    assert listed.got == [(0, {"time": 0.0, "accuracy": 0.1})]
    told = [record.getMessage() for record in caplog.records]
    assert told == ["the tracker mlflow is left out from now on (the disk is full)"]


def test_unknown_and_missing_trackers(config, monkeypatch):
    for names in ("tensorboard,wandb,", "aim", "wandb,wandb"):
        with pytest.raises(ConfigError, match=f"trackers={names}: must be some of tensorboard"):
            dataclasses.replace(config, trackers=names)
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    trackers.check(dataclasses.replace(config, trackers=""))
    with pytest.raises(ConfigError, match=r"wandb is not installed: .*'\.\[wandb\]'"):
        trackers.check(dataclasses.replace(config, trackers="wandb"))


@pytest.fixture
def store(tmp_path, monkeypatch):
    """MLflow on files, and a client that reads them."""
    # Its newer versions want a database, and would tell so.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    tracking = pytest.importorskip("mlflow.tracking", reason="needs the extra mlflow")
    return tracking.MlflowClient()


def only_run(client):
    experiment = client.get_experiment_by_name("fedrevive_jax")
    (run,) = client.search_runs([experiment.experiment_id])
    return run


@pytest.mark.slow
def test_mlflow(config, store):
    followed(config, "mlflow", ROWS[:3], ROWS[:2], ROWS)
    run = only_run(store)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    assert run.data.params["method"] == "fedbuff"
    assert run.data.tags["final_accuracy"] == "0.3"
    history = store.get_metric_history(run.info.run_id, "accuracy")
    assert [(point.step, point.value) for point in history] == [(0, 0.1), (5, 0.2), (9, 0.3)]


def records(path):
    """Those of a file of wandb, which is a log of LevelDB: blocks of 32 KiB, each record in one or
    more parts with a checksum, a length and a kind (whole, first, middle, last)."""
    data, at, record = path.read_bytes(), 7, b""  # after a header of its own
    while len(data) - at > 7:
        if at % 32768 > 32768 - 7:  # no room for a part's head
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def kept_by_wandb(folder, name):
    """The rows that a run told, in the files of its offline mode."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for path in sorted(folder.glob(f"offline-run-*-{name}*/*.wandb")):
        for data in records(path):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                rows.append({k: v for k, v in items.items() if not k.startswith("_")})
    return rows


@pytest.mark.slow
def test_wandb(config, monkeypatch):
    pytest.importorskip("wandb", reason="needs the extra wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    followed(config, "wandb", ROWS[:3], ROWS[:2], ROWS)
    name = read_json(config.run_dir / trackers.STATE)["wandb"]["id"]
    folder = config.run_dir / "wandb"
    assert len(list(folder.glob("offline-run-*"))) == len(list(folder.glob(f"*-{name}*"))) == 3
    assert kept_by_wandb(folder, name) == [
        {"time": 0.0, "accuracy": 0.1, "version": 0},
        {"time": 1.0, "accuracy": 0.2, "version": 5},
        {"dfkd/time": 1.5, "dfkd/distillation": 0.7, "version": 5},
        {"time": 2.0, "accuracy": 0.3, "version": 9},
    ]


@pytest.mark.slow
def test_a_whole_run_is_followed_and_is_the_same(tmp_path, store, monkeypatch):
    pytest.importorskip("wandb", reason="needs the extra wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    alone = small("fedbuff", workdir=str(tmp_path / "alone"))
    seen = small("fedbuff", workdir=str(tmp_path / "seen"), trackers="wandb,tensorboard,mlflow")
    one, other = (runner.run(config, keep_record=True) for config in (alone, seen))
    chex.assert_trees_all_equal(one.params, other.params)
    told = store.get_metric_history(only_run(store).info.run_id, "accuracy")
    assert [point.value for point in told] == [row["accuracy"] for row in other.evaluations]
    name = read_json(seen.run_dir / trackers.STATE)["wandb"]["id"]
    rows = kept_by_wandb(seen.run_dir / "wandb", name)
    assert [row["accuracy"] for row in rows] == [row["accuracy"] for row in other.evaluations]


@pytest.mark.slow
def test_a_server_that_is_not_there_does_not_end_a_run(tmp_path, monkeypatch, caplog):
    pytest.importorskip("mlflow.tracking", reason="needs the extra mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = small("fedbuff", workdir=str(tmp_path / "run"), trackers="mlflow")
    result = runner.run(config, keep_record=True)
    assert read_json(config.run_dir / "summary.json") == result.summary
    (told,) = [r.getMessage() for r in caplog.records if "tracker" in r.getMessage()]
    assert told.startswith("the tracker mlflow is left out from now on (")
