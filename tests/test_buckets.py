"""Runs and data in buckets: a fake bucket that can no more than a real one.

What epath is asked to do in gs://bucket is done in a folder of this machine, except for what no
bucket does: to rename, to append, to lock. Code that uses the path without epath finds nothing.
"""

import contextlib
import dataclasses
import shutil

import pytest
from etils import epath
from etils.epath import gpath, testing

from fedrevive_jax import data
from fedrevive_jax.comparison import campaign, plans, report, statistics
from fedrevive_jax.compute import buckets
from fedrevive_jax.config import whole_path
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.presets import resolve
from fedrevive_jax.record import files
from fedrevive_jax.record.checkpoint import Checkpoints
from fedrevive_jax.running import restore, runner
from fedrevive_jax.simulation.simulator import Simulation
from tests.test_checkpoint import load, names, needed, save
from tests.test_origin import config_of, draw
from tests.test_runner import _interrupt_at
from tests.toys import SMALL

PLACE = "gs://bucket"


class Death(BaseException):
    """The process is gone."""


class Bucket:
    """Counts what changes it, and lets nothing through after `left` changes."""

    def __init__(self, folder):
        self.folder, self.left, self.changes = folder, None, []

    def change(self, what):
        if self.left is not None and len(self.changes) >= self.left:
            raise Death
        self.changes.append(what)

    @contextlib.contextmanager
    def mounted(self):
        def here(path):
            return str(path).replace(PLACE, str(self.folder), 1)

        def opened(original, path, mode):
            if str(path).startswith(PLACE) and mode != "rb":
                assert mode == "wb"
                self.change(("write", path.removeprefix(PLACE)))
                # A bucket has no folders that one would have to make.
                self.folder.joinpath(here(path)).parent.mkdir(parents=True, exist_ok=True)
            return original(here(path), mode)

        def removed(original, path):
            if str(path).startswith(PLACE):
                self.change(("remove", path.removeprefix(PLACE)))
            original(here(path))
            if str(path).startswith(PLACE):
                for folder in self.folder.joinpath(here(path)).parents:
                    if folder == self.folder or any(folder.iterdir()):
                        break
                    folder.rmdir()  # a folder is what files have in their names

        def there(original, path, **how):
            return original(here(path), **how)

        def never(original, path, *arguments, **how):
            if str(path).startswith(PLACE):
                raise AssertionError(f"no bucket does that to {path}")
            return original(path, *arguments, **how)

        with testing.mock_epath(
            open=opened, remove=removed, exists=there, isdir=there, listdir=there,
            rename=never, replace=never, copy=never, mkdir=never, makedirs=never, rmtree=never,
            glob=never, walk=never, stat=never,
        ):  # fmt: skip
            yield


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A bucket, and a current folder in which nothing may appear."""
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    (tmp_path / "bucket").mkdir()
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    fake = Bucket(tmp_path / "bucket")
    with fake.mounted():
        yield fake
    assert list((tmp_path / "current").iterdir()) == []


def mirror():
    return buckets.Mirror(f"{PLACE}/run", runner._order, runner._stays_here)


@contextlib.contextmanager
def opened():
    """The checkpoints of a run in the bucket, as the next process finds them."""
    config = resolve("digits", "fedbuff", workdir=f"{PLACE}/run")
    with runner._mirrored(config, overwrite=False) as (copy, place):
        checkpoints = Checkpoints(copy.run_dir, publish=place.publish)
        try:
            yield checkpoints
        finally:
            checkpoints._thread.shutdown()


@pytest.mark.slow
def test_a_death_at_any_moment_of_a_push_leaves_a_whole_checkpoint(bucket, caplog):
    with opened() as checkpoints:
        for version in (3, 4):
            save(checkpoints, version)
    start = shutil.copytree(bucket.folder, bucket.folder.with_name("start"))
    outcomes = []
    for left in range(100):
        shutil.rmtree(bucket.folder)
        shutil.copytree(start, bucket.folder)
        died = True
        with opened() as checkpoints, contextlib.suppress(Death):
            assert load(checkpoints) == 4
            bucket.left, bucket.changes = left, []
            save(checkpoints, 5)
            died = False
        bucket.left = None
        with opened() as checkpoints:
            outcomes.append(load(checkpoints))
            save(checkpoints, 6)
        assert not [r for r in caplog.records if r.name.startswith("fedrevive_jax")]  # no warning
        assert {"6"} < names(bucket.folder / "run" / "checkpoints") <= {"4", "5", "6"}
        if not died:
            break
    assert not died
    first = outcomes.index(5)
    assert first > 5
    assert outcomes == [4] * first + [5] * (len(outcomes) - first)
    assert names(bucket.folder / "run" / "live") == needed(5, 6)  # of what is gone nothing stays


def test_what_has_not_changed_is_not_sent_again(bucket):
    with contextlib.closing(mirror()) as copy:
        (copy.folder / "a").write_text("one")
        (copy.folder / "run.lock").write_text("me")
        copy.push()
        copy.push()
        assert bucket.changes == [("write", "/run/a")]
    with contextlib.closing(mirror()) as copy:
        copy.pull()
        copy.push()
        assert len(bucket.changes) == 1
        (copy.folder / "a").write_text("another")
        copy.push()
        assert bucket.changes[1:] == [("write", "/run/a")]
        (copy.folder / "a").unlink()
        copy.push()
        assert bucket.changes[2:] == [("remove", "/run/a")]
    assert not copy.folder.exists()


@pytest.mark.slow
def test_a_run_and_its_data_in_a_bucket(bucket, tmp_path, monkeypatch):
    """Interrupted, continued by a process that knows nothing but the bucket, and as on a disk."""
    draw(bucket.folder / "imgs")
    settings = {"checkpoint_every": 2, "max_time": 6.0}
    reference = config_of(bucket.folder / "imgs", tmp_path / "local", **settings)
    result = runner.run(reference, keep_record=True)
    config = config_of(f"{PLACE}/imgs", f"{PLACE}/run", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(Simulation, "advance", _interrupt_at(5))
        with pytest.raises(KeyboardInterrupt):
            runner.run(config, keep_record=True)
    assert not runner.is_finished(config)
    assert runner.run(config, keep_record=True).resumed_version == 2
    there = bucket.folder / "run"
    assert names(there) == names(reference.run_dir) - {"run.lock"}
    assert (there / files.ARRIVALS).read_bytes() == (
        reference.run_dir / files.ARRIVALS
    ).read_bytes()
    recorded = files.read_json(there / files.CONFIG)
    assert (recorded["workdir"], recorded["data_dir"]) == (f"{PLACE}/run", f"{PLACE}/imgs")
    assert runner.is_finished(config)
    figures = restore.evaluate_checkpoint(f"{PLACE}/run")
    assert figures["same_data"]
    assert figures["accuracy"] == result.summary["final_accuracy"]
    assert runner.run(config, keep_record=True).summary["versions"] == result.summary["versions"]

    other = dataclasses.replace(config, seed=1)
    with pytest.raises(ConfigError, match=r"^workdir=gs://bucket/run: holds a run with another "):
        runner.run(other, keep_record=True)
    bucket.changes = []
    runner.run(dataclasses.replace(other, max_time=4.0), keep_record=True, overwrite=True)
    gone = [name for what, name in bucket.changes if what == "remove"]
    assert gone[0].endswith("/summary.json")
    assert ("write", "/run/config.json") not in bucket.changes[: len(gone)]
    assert files.read_json(there / files.SUMMARY)["seed"] == 1


@pytest.mark.slow
def test_a_comparison_in_a_bucket(bucket, tmp_path):
    """As one on a disk; what is done there is read, not run again, and marks and files that are not
    wanted any more go."""

    def compared(out, configs):
        lines = []
        found = campaign.run_all(configs, notify=lines.append)
        groups = statistics.grouped(found)
        return lines, groups, report.write(out, report.Study("two", "command", groups))

    def planned(out, **fields):
        given = {**SMALL, "dataset": "digits", "model_width": 2, "max_time": 4.0, **fields}
        return plans.of_methods(given, ["fedbuff", "fedrevive"], 1, out)

    place = epath.Path(f"{PLACE}/two")
    there = bucket.folder / "two"
    lines, _, _ = compared(tmp_path / "local", planned(tmp_path / "local"))
    found, groups, _ = compared(place, planned(place))
    assert found == lines
    assert names(there) == names(tmp_path / "local")
    for name in ("fedbuff_seed0", "fedrevive_seed0"):
        rows = [(folder / name / files.ARRIVALS).read_bytes() for folder in (place, there)]
        assert rows[0] == rows[1] == (tmp_path / "local" / name / files.ARRIVALS).read_bytes()
    assert groups["fedrevive"][0].made == (there / "fedrevive_seed0/synthetic.png").read_bytes()
    assert '<a href="fedbuff_seed0/report.html">seed 0</a>' in (there / "report.html").read_text()

    (there / "by_staleness.png").write_bytes(b"of an earlier comparison")
    bucket.changes = []
    assert compared(place, planned(place))[0] == []
    written = {name.removeprefix("/two/") for what, name in bucket.changes if what == "write"}
    assert written <= set(report.FILES)
    assert ("remove", "/two/by_staleness.png") in bucket.changes
    assert buckets.matching(f"{PLACE}/two/fed*_seed0", "workdirs") == [
        f"{PLACE}/two/fedbuff_seed0", f"{PLACE}/two/fedrevive_seed0",
    ]  # fmt: skip

    first = planned(place)[0]
    runner.empty(first)
    assert not runner.is_finished(first)
    assert names(there / "fedbuff_seed0") == {"config.json"}


@pytest.mark.slow
def test_a_run_in_a_bucket_that_has_failed_is_marked(bucket):
    out = epath.Path(f"{PLACE}/one")
    given = {**SMALL, "dataset": "digits", "model_width": 2, "max_time": 60.0, "server_lr": 1e30}
    configs = plans.of_methods(given, ["fedbuff"], 1, out)
    for lines in ([], []):
        (found,) = campaign.run_all(configs, notify=lines.append)
        assert found.summary is None
    assert lines == []
    mark = files.read_json(bucket.folder / "one/fedbuff_seed0/failed.json")
    assert mark["by"] == "DivergenceError"


def test_a_foreign_folder_of_a_bucket_is_never_touched(bucket):
    (bucket.folder / "run" / "years").mkdir(parents=True)
    (bucket.folder / "run" / "years" / "thesis.tex").write_text("of work")
    config = resolve("digits", "fedbuff", workdir=f"{PLACE}/run")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"gs://bucket/run: holds years but no config\.json"):
            runner.run(config, keep_record=True, overwrite=overwrite)
    assert bucket.changes == []


def test_data_that_are_not_there_are_named_as_the_user_does(bucket):
    config = resolve("fashion_mnist", "fedbuff", data_dir=f"{PLACE}/none")
    with pytest.raises(ConfigError, match=r"^data_dir=gs://bucket/none: no file train-images"):
        data.load(config)


def test_a_bucket_that_fails_is_told_in_one_line(tmp_path, monkeypatch):
    """Such as one without the package that knows its kind, or without permission."""
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)

    def fail(original, path, **how):
        raise ImportError("Please install gcsfs\nto access Google Storage")

    with testing.mock_epath(isdir=fail):
        for call, field in (
            (lambda: data.load(config_of(f"{PLACE}/a", tmp_path)), "data_dir"),
            (lambda: runner.is_finished(config_of(tmp_path, f"{PLACE}/a")), "workdir"),
            (lambda: restore.evaluate_checkpoint(f"{PLACE}/a"), "workdir"),
        ):
            with pytest.raises(ConfigError) as raised:
                call()
            assert str(raised.value) == (
                f"{field}=gs://bucket/a: cannot be read "
                "(Please install gcsfs to access Google Storage)"
            )


def test_what_must_lie_on_this_machine(tmp_path):
    for name in ("pretrained", "seed_text", "delay_trace", "cache_dir", "t5_weights"):
        with pytest.raises(ConfigError, match=f"{name}=gs://b/c: must be a path of this machine;"):
            resolve("newsgroups", "fedbuff", **{name: "gs://b/c"})
    for path in ("http://b/c", "gsx://b", "file:///tmp"):
        with pytest.raises(ConfigError, match="must be a path of this machine, or start with gs:"):
            resolve("digits", "fedbuff", workdir=path)
    assert str(resolve("digits", "fedbuff", workdir="gs://b//c/").run_dir) == "gs://b/c"
    assert whole_path("out", "a/b") == "a/b"
