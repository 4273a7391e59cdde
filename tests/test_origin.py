"""A run knows what it was made of: its data, their classes, and what it derived from them."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from fedrevive_jax import data
from fedrevive_jax.comparison import runs, statistics
from fedrevive_jax.data.texts import Texts
from fedrevive_jax.errors import ConfigError, FileError
from fedrevive_jax.presets import resolve
from fedrevive_jax.record import derived, files
from fedrevive_jax.running import restore, runner
from tests.toys import SMALL

CLASSES = ("ant", "bee", "cat")


def draw(folder, classes=CLASSES, train=12, test=5):
    """Grey 8x8 images whose level tells the class by its name, whatever folder it is in."""
    for name in classes:
        level = 60 + 60 * "abcdefgh".index(name[0])
        rng = np.random.default_rng(level)
        for part, count in (("train", train), ("test", test)):
            place = folder / part / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(level - 40, level + 41, (8, 8)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")
    return folder


def config_of(data_dir, workdir, **changes):
    settings = {
        **SMALL, "num_clients": 4, "concurrency": 2, "samples_per_client": 12, "max_time": 8.0,
        "local_iterations": 8,
        "model": "digitsnet", "client_lr": 0.01, "server_lr": 1.0, "checkpoint_every": 100,
        "workdir": str(workdir), "data_dir": str(data_dir), "delay_trace": "",
    }  # fmt: skip
    return resolve("image_folder", "fedbuff", **{**settings, **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run on three classes, told apart by their level, and its result."""
    folder = tmp_path_factory.mktemp("made")
    config = config_of(draw(folder / "imgs"), folder / "run")
    return config, runner.run(config, keep_record=True)


@pytest.fixture
def own(made, tmp_path):
    """A copy of that run and of its data, to be changed."""
    shutil.copytree(made[0].run_dir.parent, tmp_path / "own")
    return config_of(tmp_path / "own" / "imgs", tmp_path / "own" / "run")


def test_the_record_tells_data_and_classes(made):
    config, result = made
    kept = derived.read_sources(config.run_dir)
    assert kept == derived.Sources(data.digest(config), CLASSES, {})
    figures = restore.evaluate_checkpoint(config.run_dir)
    assert figures["same_data"] is True
    assert figures["accuracy"] == result.summary["final_accuracy"]
    assert tuple(figures["per_class_accuracy"]) == CLASSES
    assert np.mean(list(figures["per_class_accuracy"].values())) == pytest.approx(
        figures["accuracy"]
    )


# --- the digest -----------------------------------------------------------------------------------


def test_the_digest_is_of_the_data_alone(tmp_path):
    """Not of the seed, nor of the folder's name; a byte, a name or a label more is other data."""
    config = config_of(draw(tmp_path / "a"), tmp_path / "run")
    dataset = data.load(config)
    assert dataset.digest == data.digest(dataclasses.replace(config, seed=3))
    moved = dataclasses.replace(config, data_dir=str(draw(tmp_path / "b")))
    assert dataset.digest == data.digest(moved)
    pixel = dataset.samples.copy()
    pixel[3, 0, 0] ^= 1
    labels = dataset.labels.copy()
    labels[[0, -1]] = labels[[-1, 0]]
    for change in (
        {"samples": pixel},
        {"samples": dataset.samples.reshape(len(pixel), 4, 16, 1)},
        {"labels": labels},
        {"class_names": ("ant", "bee", "cow")},
        {"splits": {**dataset.splits, "test": dataset.splits["test"][:-1]}},
        {"groups": np.zeros(len(labels), np.int32)},
    ):
        assert dataclasses.replace(dataset, **change).digest != dataset.digest, change.keys()


def test_the_digest_of_texts_is_none_of_their_tokens(tmp_path):
    rows = [{"label": "ab"[i % 2], "text": f"word{i % 5} again"} for i in range(20)]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sizes = {"model_width": 8, "data_dir": str(tmp_path)}
    short, long = (
        resolve("text_folder", "fedbuff", text_length=n, vocabulary_size=64, **sizes)
        for n in (8, 9)
    )
    assert data.load(short).digest == data.load(long).digest == data.digest(short)
    parts = {name: np.zeros(0, np.int32) for name in ("validation", "distillation")}
    parts |= {"train": np.asarray([0], np.int32), "test": np.asarray([1], np.int32)}

    def texts(*words):
        return Texts("t", ("a", "b"), list(words), np.asarray([0, 1], np.int32), parts).digest

    assert len({texts("ab", "c"), texts("a", "bc"), texts("abc", ""), texts("", "abc")}) == 4


# --- evaluation -----------------------------------------------------------------------------------


def test_classes_are_matched_by_name(made, tmp_path, caplog):
    """cat is the model's third class and the folder's second: each class is as good as before."""
    config, _ = made
    before = restore.evaluate_checkpoint(config.run_dir)["per_class_accuracy"]
    assert max(before.values()) > 0.5  # or any mistake in the labels would look the same
    assert caplog.messages == []
    # The same seed for all classes, so that these are images of the run itself.
    figures = restore.evaluate_checkpoint(
        config.run_dir, data_dir=str(draw(tmp_path / "some", ("bee", "cat")))
    )
    assert figures["per_class_accuracy"] == {**before, "ant": None}
    assert figures["accuracy"] == pytest.approx((before["bee"] + before["cat"]) / 2)
    assert figures["same_data"] is False
    assert caplog.messages == [
        f"workdir={config.run_dir}: these are not the data of the run, or they have changed"
    ]


def test_a_class_that_the_run_does_not_know_is_named(made, tmp_path):
    other = draw(tmp_path / "other", ("bee", "cat", "dog"))
    with pytest.raises(
        ConfigError, match=rf"data_dir={other}: holds a class 'dog'; the run knows ant, bee, cat$"
    ):
        restore.evaluate_checkpoint(made[0].run_dir, data_dir=str(other))


def test_data_that_have_changed_in_place_are_told(own):
    shutil.copy(next((own.run_dir.parent / "imgs/test/ant").iterdir()), f"{own.data_dir}/test/bee")
    assert restore.evaluate_checkpoint(own.run_dir, data_dir=own.data_dir)["same_data"] is False


# --- a finished run -------------------------------------------------------------------------------


def test_a_finished_run_on_other_data_is_not_this_one(own):
    assert runner.is_finished(own)
    assert runs.is_done(own)
    extra = f"{own.data_dir}/train/cat/0.png", f"{own.data_dir}/train/cat/more.png"
    shutil.copy(*extra)
    message = rf"workdir={own.run_dir}: holds a run on other data \(SHA-256 \w+, now \w+\); give an"
    for finished in (
        runner.is_finished,
        runs.is_done,
        lambda config: runner.run(config, keep_record=True),
    ):
        with pytest.raises(ConfigError, match=message):
            finished(own)
    assert not runner.is_finished(own, overwrite=True)
    (own.run_dir / files.SUMMARY).unlink()  # one that failed
    files.write_json(own.run_dir / runs.FAILED, {})
    with pytest.raises(ConfigError, match=message):
        runs.is_done(own)


def test_a_run_is_not_continued_on_other_data(own):
    (own.run_dir / files.SUMMARY).unlink()
    shutil.copy(f"{own.data_dir}/train/cat/0.png", f"{own.data_dir}/train/cat/more.png")
    with pytest.raises(ConfigError, match="holds a run on other data"):
        runner.run(own, keep_record=True)


def test_data_may_move_and_paths_may_be_said_otherwise(own, tmp_path, monkeypatch):
    """Relative, through a link, from another folder: only what lies there counts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(own.data_dir)
    for place in ("own/imgs", "link", "own/../link"):
        assert runner.is_finished(dataclasses.replace(own, data_dir=place))
    other = draw(tmp_path / "elsewhere" / "own" / "imgs", ("ant", "bee", "dog"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="holds a run on other data"):
        runner.is_finished(dataclasses.replace(own, data_dir="own/imgs"))
    assert other.is_dir()


def test_every_path_is_recorded_whole_and_compared_where_it_leads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trace.csv").touch()
    (tmp_path / "link.csv").symlink_to("trace.csv")
    paths = {
        "workdir": "run", "data_dir": "imgs", "cache_dir": "cache", "seed_text": "seed.jsonl",
        "pretrained": "old", "delays": "trace", "delay_trace": "trace.csv",
    }  # fmt: skip
    config = resolve("image_folder", "fedbuff", **paths)
    settled = runner.settle(config)
    for name, value in paths.items():
        if name != "delays":
            assert getattr(settled, name) == str(tmp_path / value)
    assert runner.settle(resolve("digits", "fedbuff")).workdir == str(
        tmp_path / "runs" / "digits_fedbuff_seed0"
    )
    assert runner.settle(resolve("digits", "fedbuff")).data_dir == ""
    (tmp_path / "config.json").write_text(json.dumps(settled.as_dict()))
    same = runner.settle(dataclasses.replace(config, delay_trace="link.csv"))
    assert files.configured_differently(tmp_path, same) == []
    (tmp_path / "link.csv").unlink()
    (tmp_path / "link.csv").symlink_to("another.csv")
    assert len(files.configured_differently(tmp_path, same)) == 1


def test_another_trace_under_the_same_name_is_noticed(tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("one")
    config = resolve("digits", "fedbuff", delays="trace", delay_trace=str(trace))
    before = derived.sources_of(config, "", ())
    assert derived.changed(before, derived.sources_of(config, "", ())) == ""
    trace.write_text("another")
    assert derived.changed(before, derived.sources_of(config, "", ())) == (
        "another file for `delay_trace`"
    )
    trace.unlink()
    assert derived.changed(before, derived.sources_of(config, "", ()))


# --- what was derived -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [derived.CLIENTS, derived.TOKENIZER, derived.ORIGIN])
@pytest.mark.parametrize("damage", ["deleted", "changed"])
def test_a_derived_file_is_never_made_again(made, tmp_path, name, damage):
    """Neither for another run nor for an evaluation, where that needs it."""
    kept = derived.read(made[0].run_dir)
    derived.write(tmp_path, kept._replace(tokenizer='{"model": 1}'), kept.sources)
    again = derived.read(tmp_path)
    assert (again.tokenizer, again.origin, again.sources) == (
        '{"model": 1}', kept.origin, kept.sources,
    )  # fmt: skip
    np.testing.assert_array_equal(again.shards.indices, kept.shards.indices)
    np.testing.assert_array_equal(again.shards.offsets, kept.shards.offsets)
    path = tmp_path / name
    if damage == "deleted":
        path.unlink()
        words = r"cannot be read \(No such file or directory\)"
    else:
        raw = path.read_bytes()
        path.write_bytes(raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 128]) + raw[-1:])
        words = "is damaged" if name == derived.ORIGIN else "has changed since the run began"
    readers = [derived.read]
    readers += [derived.read_known] if name != derived.CLIENTS else []
    readers += [derived.read_sources] if name == derived.ORIGIN else []
    for read in readers:
        with pytest.raises(FileError, match=rf"^{path}: {words}") as raised:
            read(tmp_path)
        assert len(str(raised.value).splitlines()) == 1
    if name == derived.CLIENTS:
        assert derived.read_known(tmp_path).tokenizer == '{"model": 1}'


def test_who_holds_what_is_read_not_drawn_again(own):
    """What is gone is asked for, of a finished run and of one that is continued."""
    (own.run_dir / derived.CLIENTS).unlink()
    with pytest.raises(FileError, match=r"clients\.npz: cannot be read"):
        runner.is_finished(own)
    (own.run_dir / files.SUMMARY).unlink()
    with pytest.raises(FileError, match=r"clients\.npz: cannot be read"):
        runner.run(own, keep_record=True)


# --- comparisons ----------------------------------------------------------------------------------


def test_runs_on_other_data_are_not_compared(own, made):
    first = statistics.read_run(made[0].run_dir)
    assert first.sources.classes == CLASSES
    second = statistics.read_run(own.run_dir)
    second = second._replace(config=dataclasses.replace(second.config, seed=1))
    assert len(statistics.grouped([first, second])["fedbuff"]) == 2  # data that have moved
    other = second._replace(sources=second.sources._replace(data_sha256="0" * 64))
    with pytest.raises(FileError) as raised:
        statistics.grouped([first, other])
    for folder in (first.folder, other.folder):
        assert str(folder) in str(raised.value)
    # Other data sets, which nobody takes for the same, may stand beside each other.
    fields = {"workdir": "", "data_dir": ""}
    digits = other._replace(config=resolve("digits", "fedbuff", **fields))
    assert len(statistics.grouped([first, digits])) == 2


def test_runs_with_another_trace_of_the_same_name_are_not_compared(made, tmp_path):
    run = statistics.read_run(made[0].run_dir)
    traced = dataclasses.replace(run.config, delays="trace", delay_trace=str(tmp_path / "t.csv"))
    one, other = (
        run._replace(
            config=dataclasses.replace(traced, seed=seed),
            sources=run.sources._replace(inputs={"delay_trace": digest}),
        )
        for seed, digest in enumerate(("1" * 64, "2" * 64))
    )
    statistics.grouped([one, other._replace(sources=one.sources)])
    with pytest.raises(FileError, match="different delays"):
        statistics.grouped([one, other])


def test_a_record_without_an_origin_is_refused_in_one_line(own):
    """Such as one of an older version of the package."""
    (own.run_dir / derived.ORIGIN).write_text('{"start": "random"}\n')
    for read in (restore.evaluate_checkpoint, statistics.read_run):
        with pytest.raises(FileError, match=r"origin\.json: is damaged, or of another version"):
            read(own.run_dir)
