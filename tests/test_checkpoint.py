"""Checkpoints against real faults: changed files, deaths at any step of a save, full disks.

No model is trained here: what is saved are small trees whose values follow from the version, so
that whatever is restored can be compared with what must have been written.
"""

import contextlib
import errno
import hashlib
import logging
import os
import pickle
import random
import resource
import shutil
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from fedrevive_jax.errors import ConfigError
from fedrevive_jax.record import archive, checkpoint
from fedrevive_jax.record.archive import CorruptError
from fedrevive_jax.record.checkpoint import CheckpointError, Checkpoints, has_checkpoint
from tests.commands import nobody
from tests.killed_run import is_change


def params_of(version):
    rng = np.random.default_rng(version)
    kernel = jnp.asarray(rng.normal(size=(3, 5)), jnp.float32)
    return {"conv": {"kernel": kernel, "bias": jnp.zeros(5)}, "scale": jnp.asarray(version / 7)}


def arrays_of(record):
    rng = np.random.default_rng(record["version"] + 1000)
    method = {
        "pool": jnp.asarray(rng.integers(0, 255, (40, 6)), jnp.uint8),
        "teachers": (jnp.asarray(rng.normal(size=(2, 30)), jnp.bfloat16), jnp.asarray(7)),
    }
    uploads = {str(job): {"params": params_of(job + 5000)} for job in record["uploads"]}
    return {
        "method": method,
        "stale": {str(version): params_of(version) for version in record["stale"]},
        "uploads": uploads,
    }


def record_of(version):
    """Versions 3, 2 and 1 older are stale, and two of four jobs move on with every version."""
    stale = [v for v in range(version - 3, version) if v >= 0]
    jobs = range(2 * version, 2 * version + 4)
    return {"version": version, "stale": stale, "uploads": list(jobs), "half": 0.1 * version}


def shapes_of(record):
    return jax.eval_shape(lambda: arrays_of(record))


def save(checkpoints, version):
    record = record_of(version)
    checkpoints.save(record, params_of(version), arrays_of(record))
    checkpoints.wait()


def load(checkpoints):
    """The newest good step, held to what must have been written; None where there is none."""
    found = checkpoints.newest_good(lambda step: checkpoints.load(step, params_of(step), shapes_of))
    if found is None:
        return None
    step, saved = found
    record = record_of(step)
    assert saved.record == record
    wanted = (params_of(step), arrays_of(record))
    assert jax.tree.structure((saved.params, saved.arrays)) == jax.tree.structure(wanted)
    for a, b in zip(*map(jax.tree.leaves, ((saved.params, saved.arrays), wanted)), strict=True):
        assert a.dtype == b.dtype
        assert a.tobytes() == np.asarray(b).tobytes()
    return step


def names(folder):
    return {path.name for path in folder.iterdir()}


def needed(*versions):
    records = [record_of(version) for version in versions]
    return {f"version_{v}.npz" for r in records for v in r["stale"]} | {
        f"upload_{j}.npz" for r in records for j in r["uploads"]
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoints of versions 4 and 5."""
    folder = tmp_path_factory.mktemp("saved")
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        for version in (3, 4, 5):
            save(checkpoints, version)
    return folder


def copied(saved, folder):
    shutil.copytree(saved, folder)
    return folder


def test_what_is_saved_is_restored_and_written_once(tmp_path):
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        assert load(checkpoints) is None
        assert not has_checkpoint(tmp_path)
        save(checkpoints, 3)
        save(checkpoints, 4)
        before = {path.name: path.stat() for path in (tmp_path / "live").iterdir()}
        assert before.keys() == needed(3, 4)
        save(checkpoints, 5)
    after = {path.name: path.stat() for path in (tmp_path / "live").iterdir()}
    assert after.keys() == needed(4, 5)  # what only version 3 needed is gone
    for name in before.keys() & after.keys():
        same = [(s[name].st_ino, s[name].st_mtime_ns) for s in (before, after)]
        assert same[0] == same[1]
    assert names(tmp_path / "checkpoints") == {"4", "5"}
    # Another process goes on without writing anything again that it has found whole.
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        assert load(checkpoints) == 5
        save(checkpoints, 6)
    again = {path.name: path.stat() for path in (tmp_path / "live").iterdir()}
    assert again.keys() == needed(5, 6)
    assert all(again[n].st_ino == after[n].st_ino for n in again.keys() & after.keys())


def test_the_global_model_is_a_plain_orbax_checkpoint(saved):
    plain = ocp.StandardCheckpointer().restore(saved / "checkpoints" / "5" / "params")
    manager = ocp.CheckpointManager(
        saved / "checkpoints",
        item_names=("params",),
        options=ocp.CheckpointManagerOptions(read_only=True),
    )
    assert sorted(manager.all_steps()) == [4, 5]
    arguments = ocp.args.Composite(params=ocp.args.StandardRestore(params_of(0)))
    managed = manager.restore(5, args=arguments)["params"]
    manager.close()
    for found in (plain, managed):
        jax.tree.map(np.testing.assert_array_equal, found, params_of(5))


def test_a_version_is_saved_again_where_more_has_arrived(saved, tmp_path):
    """A run that ends in the middle of a buffer has its last version saved already."""
    folder = copied(saved, tmp_path / "run")
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save(record_of(5) | {"half": 9.0}, params_of(5), arrays_of(record_of(5)))
        checkpoints.wait()
        assert checkpoints.record(5)["half"] == 9.0
    assert names(folder / "checkpoints") == {"4", "5"}


# --- bit rot --------------------------------------------------------------------------------------


def files_of(folder, version):
    """All files that belong to a version's checkpoint."""
    own = [p for p in (folder / "checkpoints" / str(version)).rglob("*") if p.is_file()]
    return sorted(own) + sorted(folder / "live" / name for name in needed(version))


def flip(path, rng):
    raw = bytearray(path.read_bytes())
    place = rng.randrange(8 * len(raw))
    raw[place // 8] ^= 1 << place % 8
    path.write_bytes(raw)


def zero(path, rng):
    raw = bytearray(path.read_bytes())
    start = rng.randrange(len(raw))
    # A block with something in it: zeroing zeros changes nothing.
    while not any(raw[start : start + 64]):
        start = rng.randrange(len(raw))
    raw[start : start + 64] = bytes(len(raw[start : start + 64]))
    path.write_bytes(raw)


def truncate(path, rng):
    os.truncate(path, rng.randrange(path.stat().st_size))


def delete(path, rng):
    path.unlink()


def corrupt(folder, rng, kinds):
    """Damages one file of the newest checkpoint; tells what was done and to which."""
    kind = rng.choice(kinds)
    path = rng.choice([p for p in files_of(folder, 5) if p.stat().st_size])
    kind(path, rng)
    return kind, path


def outcome(folder):
    """The step that is restored, after `load` has held it to the truth; 0 where none is whole.

    The latter where a file is damaged that both checkpoints need.
    """
    try:
        return load(Checkpoints(folder, read_only=True))
    except ConfigError as error:
        return 0 if "no checkpoint is whole; corrupt: 5, 4" in str(error) else -1


def test_corruptions_are_found(saved, tmp_path, caplog):
    """50 of 50: the damaged checkpoint is named, and what is restored in its place is right."""
    rng = random.Random(0)
    assert outcome(saved) == 5  # the control
    for trial in range(50):
        folder = copied(saved, tmp_path / str(trial))
        what = corrupt(folder, rng, [flip, flip, flip, zero, truncate, delete])
        caplog.clear()
        assert outcome(folder) in (0, 4), what
        assert f"workdir={folder}: checkpoint 5 is corrupt (" in caplog.messages[0]
        shutil.rmtree(folder)


def test_a_flipped_bit_of_a_value_is_always_found(saved, tmp_path, caplog):
    """Also by the checksums of the leaves alone, which tell the name of the leaf."""
    truth = {
        "state": jax.tree.map(np.asarray, {"method": arrays_of(record_of(5))["method"]}),
        "params": jax.tree.map(np.asarray, params_of(5)),
    }
    rng = random.Random(1)
    for tree in truth.values():
        leaves = archive.describe(tree)
        archive.check(tree, leaves)
        for name, leaf in zip(leaves, jax.tree.leaves(tree), strict=True):
            changed = leaf.copy()
            raw = changed.reshape(-1).view(np.uint8)
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            damaged = jax.tree.map(lambda x, old=leaf, new=changed: new if x is old else x, tree)
            with pytest.raises(CorruptError, match=f"the checksum of {name} failed"):
                archive.check(damaged, leaves)
    with pytest.raises(CorruptError, match="holds other arrays"):
        archive.check(truth["params"]["conv"], archive.describe(truth["params"]))


def test_empty_and_foreign_step_folders_are_passed_over_and_put_aside(saved, tmp_path, caplog):
    folder = copied(saved, tmp_path / "run")
    checkpoints = folder / "checkpoints"
    (checkpoints / "9").mkdir()
    (checkpoints / "7").write_text("not a folder")
    shutil.copytree(checkpoints / "5", checkpoints / "8")  # right sums, wrong place
    (checkpoints / "05").mkdir()  # no version is called so
    with contextlib.closing(Checkpoints(folder)) as opened, caplog.at_level(logging.WARNING):
        assert load(opened) == 5
        assert [message.split(": ")[1] for message in caplog.messages] == [
            "checkpoint 9 is corrupt (record.json or its checksum is missing); trying the one "
            "before it",
            "checkpoint 8 is corrupt (it is the checkpoint of version 5); trying the one before it",
            "checkpoint 7 is corrupt (record.json or its checksum is missing); trying the one "
            "before it",
        ]
        # The run comes to the same versions again, with the older checkpoint still there.
        save(opened, 7)
        save(opened, 8)
        assert load(opened) == 8
    put_aside = {"7.corrupt", "8.corrupt", "9.corrupt"}
    assert names(checkpoints) == {"7", "8", "05"} | put_aside


def test_without_a_good_checkpoint_nothing_is_changed(saved, tmp_path):
    folder = copied(saved, tmp_path / "run")
    for step in "45":
        (folder / "checkpoints" / step / "state.npz").unlink()
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        message = rf"workdir={folder}: no checkpoint is whole; corrupt: 5, 4"
        with pytest.raises(ConfigError, match=message):
            load(checkpoints)
    assert names(folder / "checkpoints") == {"4", "5"}


def test_nothing_is_unpickled(saved, tmp_path):
    """An archive that would run code when unpickled is a corrupt one, and the code does not run.

    Nor does it end in a traceback when a record with a right checksum says something else.
    """

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    folder = copied(saved, tmp_path / "run")
    path = folder / "checkpoints" / "5" / "state.npz"
    np.savez(path, np.array([Trap()], dtype=object))
    assert outcome(folder) == 4
    path.write_bytes(pickle.dumps(Trap()))
    assert outcome(folder) == 4
    (folder / "checkpoints" / "5" / "record.json").write_bytes(pickle.dumps(Trap()))
    assert outcome(folder) == 4
    for foreign in ("[]", "{}", '{"record": {"version": 5}, "sums": 3}', "[" * 100_000):
        record = folder / "checkpoints" / "5" / "record.json"
        archive.write_sealed(record, 0)
        record.write_text(foreign)
        digest = hashlib.sha256(foreign.encode()).hexdigest()
        record.with_name("record.json.sha256").write_text(f"{digest}  record.json\n")
        assert outcome(folder) == 4
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pickle.dumps(Trap()))
    assert (tmp_path / "sprung").exists()  # the control: the trap works


# --- death at any step of a save ------------------------------------------------------------------


class Death(BaseException):
    """The process is gone: from now on nothing reaches the disk."""


class Reaper:
    """Ends the world at the n-th change of a folder, as an audit hook sees it."""

    def __init__(self):
        self.folder, self.left, self.seen = None, 0, 0
        sys.addaudithook(self._hook)

    def _hook(self, event, arguments):
        if self.folder is not None and is_change(event, arguments, str(self.folder)):
            self.seen += 1
            if self.seen > self.left:
                raise Death

    @contextlib.contextmanager
    def after(self, changes, folder):
        self.folder, self.left, self.seen = folder, changes, 0
        try:
            yield
        finally:
            self.folder = None


@pytest.fixture(scope="module")
def reaper():
    return Reaper()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "version"), [([], 3), ([3, 4], 5), ([4, 5], 5)], ids=["first", "next", "again"]
)
def test_a_death_at_any_step_of_a_save_leaves_a_whole_checkpoint(
    reaper, tmp_path, caplog, before, version
):
    """All of them, those of deleting what is old included; never is a checkpoint half."""
    start = tmp_path / "start"
    start.mkdir()
    with contextlib.closing(Checkpoints(start)) as checkpoints:
        for old in before:
            save(checkpoints, old)
    outcomes = []
    for changes in range(200):
        folder = copied(start, tmp_path / str(changes))
        checkpoints = Checkpoints(folder)
        load(checkpoints)
        died = True
        with reaper.after(changes, folder), contextlib.suppress(Death):
            save(checkpoints, version)
            died = False
        checkpoints._thread.shutdown()
        with contextlib.closing(Checkpoints(folder)) as restarted:
            outcomes.append(load(restarted))
            save(restarted, version)
            save(restarted, version + 1)
            assert load(restarted) == version + 1
        assert not [r for r in caplog.records if r.name.startswith("fedrevive_jax")]  # no warning
        assert names(folder / "checkpoints") == {str(version), str(version + 1)}
        assert names(folder / "live") == needed(version, version + 1)
        shutil.rmtree(folder)
        if not died:
            break
    assert not died
    assert len(outcomes) > 10
    # The old one until the new one is whole, then the new one; there is nothing between.
    old = before[-1] if before else None
    first = outcomes.index(version)
    assert outcomes == [old] * first + [version] * (len(outcomes) - first)


# --- disks and folders ----------------------------------------------------------------------------


@contextlib.contextmanager
def files_of_at_most(size):
    """The system refuses to make any file longer: what a quota or a full disk looks like."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 100, 700])
def test_a_full_disk_is_told_and_nothing_is_lost(saved, tmp_path, size):
    """Nothing fits; a small file fits; all but the method's state fits."""
    folder = copied(saved, tmp_path / "run")
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        load(checkpoints)
        with files_of_at_most(size):
            checkpoints.save(record_of(6), params_of(6), arrays_of(record_of(6)))
            message = (
                rf"^workdir={folder}: the checkpoint of version 6 could not be written "
                rf"\({os.strerror(errno.EFBIG)}\); the newest on disk is of version 5$"
            )
            with pytest.raises(CheckpointError, match=message):
                checkpoints.wait()
            assert checkpoints.steps() == [4, 5]
            # The next call raises what is not waited for.
            checkpoints.save(record_of(6), params_of(6), arrays_of(record_of(6)))
            with pytest.raises(CheckpointError, match="version 6 could not"):
                checkpoints.save(record_of(7), params_of(7), arrays_of(record_of(7)))
        assert names(folder / "checkpoints") == {"4", "5"}
        assert load(checkpoints) == 5
        save(checkpoints, 6)  # there is room again
        assert load(checkpoints) == 6


def test_orbax_without_room_is_told_too(saved, tmp_path):
    """Only orbax's files are too long: it raises an error of its own."""
    folder = copied(saved, tmp_path / "run")
    big = {"w": jnp.asarray(np.random.default_rng(0).normal(size=20_000), jnp.float32)}
    record = {"version": 6, "stale": [], "uploads": []}
    with contextlib.closing(Checkpoints(folder)) as checkpoints, files_of_at_most(20_000):
        checkpoints.save(record, big, {"method": {}, "stale": {}, "uploads": {}})
        with pytest.raises(CheckpointError, match=r"version 6 could not be written \(.+\); the"):
            checkpoints.wait()
    assert names(folder / "checkpoints") == {"4", "5"}


def test_a_folder_that_is_removed_is_told(saved, tmp_path):
    for gone, left in (("checkpoints", "there is none"), ("live", "the newest on disk is of")):
        folder = copied(saved, tmp_path / gone / "run")
        with contextlib.closing(Checkpoints(folder)) as checkpoints:
            load(checkpoints)
            shutil.rmtree(folder / gone)
            checkpoints.save(record_of(6), params_of(6), arrays_of(record_of(6)))
            with pytest.raises(CheckpointError, match=rf"\(No such file or directory\); {left}"):
                checkpoints.wait()


def test_a_folder_that_becomes_read_only_is_told(saved):
    with tempfile.TemporaryDirectory() as outer:
        os.chmod(outer, 0o755)
        folder = copied(saved, Path(outer) / "run")
        with contextlib.closing(Checkpoints(folder)) as checkpoints:
            load(checkpoints)
            for path in (folder, folder / "live", folder / "checkpoints"):
                path.chmod(0o555)
            with nobody():
                checkpoints.save(record_of(6), params_of(6), arrays_of(record_of(6)))
                with pytest.raises(CheckpointError, match=r"\(Permission denied\); the newest"):
                    checkpoints.wait()
            for path in (folder, folder / "live", folder / "checkpoints"):
                path.chmod(0o755)
            assert load(checkpoints) == 5


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(27, "File too large"), "File too large"),
        (
            ValueError(
                "OUT_OF_RANGE: Failed to write 98 bytes to file 26: File too large "
                "[os_error_code='27'] [tensorstore_spec='{...}']"
            ),
            "File too large",
        ),
        (ValueError("one\ntwo"), "one"),
        (ValueError(), "ValueError"),
    ],
)
def test_a_reason_is_short(error, told):
    assert checkpoint._reason(error) == told
