"""Sources of data on disk: what is read is what was written, bad data give one clear line."""

import importlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageCms

from experiments.prepare import prepare
from fedrevive_jax.clock import delays
from fedrevive_jax.config import Config
from fedrevive_jax.data import (
    augment,
    image_folder,
    names,
    pixels,
    text_folder,
    tfds_reader,
    tokens,
)
from fedrevive_jax.data.builders import femnist as femnist_builder
from fedrevive_jax.data.builders import newsgroups as newsgroups_builder
from fedrevive_jax.data.dataset import Preprocessing, split_by_class
from fedrevive_jax.data.femnist import CHARACTERS, split_writers
from fedrevive_jax.data.newsgroups import CLASS_NAMES
from fedrevive_jax.data.partition import partition
from fedrevive_jax.data.texts import Texts
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.models import t5_weights
from tests import prepared
from tests.commands import nobody

IMAGES = {"cifar10": (32, 32, 3), "cifar100": (32, 32, 3), "fashion_mnist": (28, 28, 1)}


def load(name, folder, seed=0):
    return importlib.import_module(f"fedrevive_jax.data.{name}").load(str(folder), seed)


def spec(name):
    return importlib.import_module(f"fedrevive_jax.data.{name}").SPEC


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with all prepared data sets, 200 training and 100 test samples each."""
    folder = tmp_path_factory.mktemp("prepared")
    for name in prepared.NAMES:
        prepared.write(name, folder)
    return folder


def nearest_pattern(dataset):
    """The class whose mean image is nearest, for each image."""
    pixels = dataset.samples.reshape(len(dataset.samples), -1).astype(np.float64)
    classes = np.unique(dataset.labels)
    means = np.stack([pixels[dataset.labels == c].mean(axis=0) for c in classes])
    return classes[((pixels[:, None] - means) ** 2).sum(axis=-1).argmin(axis=1)]


@pytest.mark.parametrize("name", IMAGES)
def test_official_image_data(small, name):
    dataset = load(name, small)
    assert dataset.samples.shape == (300, *IMAGES[name])
    assert dataset.samples.dtype == np.uint8
    sizes = {split: len(positions) for split, positions in dataset.splits.items()}
    assert sizes == {"train": 150, "validation": 30, "distillation": 20, "test": 100}
    assert sorted(np.concatenate(list(dataset.splits.values()))) == list(range(300))
    assert spec(name).input_shape == dataset.input_shape
    assert spec(name).num_classes == dataset.num_classes
    module = importlib.import_module(f"fedrevive_jax.data.{name}")
    assert dataset.class_names == module.CLASS_NAMES
    assert len(set(dataset.class_names)) == dataset.num_classes
    stored = tfds_reader.find(name, str(small)).builder.info.features["label"].names
    # TFDS's builder of CIFAR reads the names only when it reads the images.
    assert list(dataset.class_names) == stored or stored == [str(i) for i in range(len(stored))]
    # Each label stands beside its own image, in both splits.
    assert len(np.unique(dataset.labels)) == dataset.num_classes
    np.testing.assert_array_equal(nearest_pattern(dataset), dataset.labels)
    other = load(name, small, seed=1)
    np.testing.assert_array_equal(dataset.splits["test"], other.splits["test"])
    assert (dataset.splits["train"] != other.splits["train"]).any()


def test_preprocessing_of_cifar(small):
    ten, hundred = load("cifar10", small).preprocessing, load("cifar100", small).preprocessing
    assert (ten.crop_padding, ten.flip, ten.rotation) == (4, True, 0)
    assert (hundred.crop_padding, hundred.flip, hundred.rotation) == (4, True, 15)
    assert ten.mean == (0.4914, 0.4822, 0.4465)
    assert hundred.std == (0.268, 0.257, 0.276)
    assert load("femnist", small).preprocessing == Preprocessing()


def test_reading_leaves_tensorflow_out(small):
    code = (
        "import importlib, sys\n"
        f"for name in {prepared.NAMES}:\n"
        f"    importlib.import_module(f'fedrevive_jax.data.{{name}}').load({str(small)!r}, 0)\n"
        "assert 'tensorflow_datasets' in sys.modules\n"
        "assert not {'tensorflow', 'jax'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_knowing_what_a_data_set_is_imports_no_tfds():
    code = (
        "import sys\n"
        "from fedrevive_jax.data import cifar10, cifar100, femnist, newsgroups, fashion_mnist\n"
        "assert not {'tensorflow_datasets', 'tensorflow', 'jax'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_blocks_and_shards_are_read_as_tfds_reads_them(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_reader, "_BLOCK", 4)
    prepared.write_images("cifar10", tmp_path, {"train": 30, "test": 7}, num_shards=3)
    dataset = load("cifar10", tmp_path)
    builder = tfds_reader.find("cifar10", str(tmp_path)).builder
    assert len(builder.info.splits["train"].filepaths) == 3
    one_by_one = [*builder.as_data_source("train"), *builder.as_data_source("test")]
    np.testing.assert_array_equal(dataset.samples, [x["image"] for x in one_by_one])
    np.testing.assert_array_equal(dataset.labels, [x["label"] for x in one_by_one])


def test_the_newest_version_is_read(tmp_path):
    folder = prepared.write_images("cifar10", tmp_path, {"train": 30, "test": 7})
    # 3.0.10 is newer than 3.0.2, although not in alphabetical order.
    folder.rename(folder.with_name("3.0.10"))
    prepared.write_images("cifar10", tmp_path, {"train": 40, "test": 7})
    assert len(load("cifar10", tmp_path).labels) == 37


def shard(folder, split="test"):
    return next(folder.glob(f"*-{split}.array_record-*"))


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def flip_bytes(path):
    raw = bytearray(path.read_bytes())
    middle = len(raw) // 2
    # Every hundredth byte: somewhere among the records, not only in the padding between them.
    for position in range(0, middle, 100):
        raw[position + middle // 2] ^= 255
    path.write_bytes(bytes(raw))


def rewrite(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: cut(shard(f)), r"cifar10-test\S*-00000-of-00001: damaged, 0 of 30 records"),
        (lambda f: shard(f).write_bytes(b""), r"cifar10-test\S*: damaged, 0 of 30"),
        (lambda f: shard(f).unlink(), r"cifar10-test\S*: no such file"),
        (lambda f: flip_bytes(shard(f, "train")), r"cifar10-train\S*: damaged"),
        (
            lambda f: shard(f).write_bytes(shard(f, "train").read_bytes()),
            r"cifar10-test\S*: damaged, 60 of 30",
        ),
        (lambda f: cut(f / "dataset_info.json"), "3.0.2: dataset_info.json or features.json is"),
        (lambda f: (f / "features.json").unlink(), "3.0.2: dataset_info.json or features.json is"),
        (
            lambda f: rewrite(f / "dataset_info.json", '"array_record"', '"tfrecord"'),
            "holds tfrecord files, must be array_record",
        ),
        (
            lambda f: rewrite(f / "dataset_info.json", '"name": "test"', '"name": "dev"'),
            "3.0.2: no split 'test', has",
        ),
        (
            lambda f: rewrite(f / "features.json", '"label":', '"digit":'),
            "features.json: no feature 'label', has",
        ),
        (
            lambda f: rewrite(f / "features.json", '"32"', '"28"'),
            "features.json: images are 28x28x3, must be 32x32x3",
        ),
    ],
)  # fmt: skip
def test_damaged_prepared_data(tmp_path, damage, message):
    folder = prepared.write_images("cifar10", tmp_path, {"train": 60, "test": 30})
    load("cifar10", tmp_path)
    damage(folder)
    with pytest.raises(ConfigError, match=message) as caught:
        load("cifar10", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": 11}, r"cifar10-train\S*: label 10, must be in 0..9"),
        ({"encode": lambda image: b"no image"}, r"cifar10-train\S*: an image cannot be decoded"),
        ({"encode": lambda image: prepared.png(image)[:-60]}, "an image cannot be decoded"),
        (
            {"encode": lambda image: encode(Image.fromarray(image).convert("P"), "PNG")},
            r"cifar10-train\S*: an image's pixels are P, must be L or RGB",
        ),
        (
            {"encode": lambda image: prepared.png(image[1:])},
            r"an image is 31x32x3 uint8, must be 32x32x3 uint8",
        ),
    ],
)
def test_prepared_data_of_another_kind(tmp_path, change, message):
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(shape=(32, 32, 3)),
        "label": tfds.features.ClassLabel(num_classes=change.get("classes", 10)),
    }
    encode = change.get("encode", prepared.png)
    sizes = {"train": 60, "test": 30}
    prepared.write_images("cifar10", tmp_path, sizes, features=features, encode=encode)
    with pytest.raises(ConfigError, match=message):
        load("cifar10", tmp_path)


@pytest.mark.parametrize("name", prepared.NAMES)
def test_data_that_are_not_prepared(tmp_path, name):
    command = f"python -m experiments.prepare --dataset={name} --data_dir="
    with pytest.raises(ConfigError, match=f"data_dir=: must name the folder .*{command}DIR"):
        load(name, "")
    # What a preparation that was killed leaves behind.
    unfinished = tmp_path / name / "incomplete.ABCDEF_1.0.0"
    unfinished.mkdir(parents=True)
    unfinished.joinpath("dataset_info.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"prepared there; to prepare it: {command}{tmp_path}$"):
        load(name, tmp_path)


def test_fashion_mnist_prefers_idx_files(small, tmp_path):
    assert len(load("fashion_mnist", small).labels) == 300
    folder = tmp_path / "fashion_mnist"
    folder.symlink_to(small / "fashion_mnist")
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"cut")
    with pytest.raises(ConfigError, match="train-images-idx3-ubyte is not an IDX file"):
        load("fashion_mnist", tmp_path)


# FEMNIST


def test_femnist_writers(small):
    dataset = load("femnist", small)
    assert dataset.samples.shape == (300, 28, 28, 1)
    assert dataset.num_classes == len(CHARACTERS) == 62
    sizes = np.bincount(dataset.groups)
    assert len(sizes) == 12
    assert sizes.max() > 5 * sizes.min()
    assert len(np.unique(dataset.labels)) == 62
    np.testing.assert_array_equal(nearest_pattern(dataset), dataset.labels)
    # Rows were written by writer with labels in turn, so a writer's labels follow one another.
    for writer in range(12):
        own = np.sort(dataset.labels[dataset.groups == writer])
        steps = np.diff(np.concatenate([own, own[:1] + 62]))
        assert np.sort(steps)[:-1].max() <= 1
    train = dataset.splits["train"]
    shards = partition(
        "natural", train, dataset.labels, num_classes=62, num_clients=12, samples_per_client=1,
        alpha=1.0, seed=0, groups=dataset.groups,
    )  # fmt: skip
    for client in range(12):
        assert set(dataset.groups[shards.client(client)]) == {client}


def test_split_of_writers():
    writers = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], [1, 2, 20, 1000]))
    splits = split_writers(writers, 0)
    assert sorted(np.concatenate(list(splits.values()))) == list(range(1023))
    counts = {name: np.bincount(writers[part], minlength=4) for name, part in splits.items()}
    assert {name: count.tolist() for name, count in counts.items()} == {
        "train": [1, 1, 12, 600], "validation": [0, 1, 3, 150],
        "test": [0, 0, 3, 150], "distillation": [0, 0, 2, 100],
    }  # fmt: skip
    for size in range(1, 200):
        assert len(split_writers(np.zeros(size, int), 0)["train"]) >= 1
    again, other = split_writers(writers, 0), split_writers(writers, 1)
    np.testing.assert_array_equal(splits["train"], again["train"])
    assert set(splits["train"]) != set(other["train"])
    assert set(splits["validation"]) != set(other["validation"])
    np.testing.assert_array_equal(splits["test"], other["test"])


def test_leaf_and_parquet_give_the_same(tmp_path):
    writers = {"f0001_02": [0, 61, 10], "f0000_14": [35] * 5}
    rows = prepared.femnist_rows(8, 2)
    rows["writer_id"] = ["f0001_02"] * 3 + ["f0000_14"] * 5
    rows["character"] = [0, 61, 10, *[35] * 5]
    images = prepared.images(np.asarray([0, 61, 10]), (28, 28, 1))
    images = [*images, *prepared.images(np.asarray([35] * 5), (28, 28, 1))]
    # A coloured copy and one in another format are stored as grey PNG files all the same.
    buffer = io.BytesIO()
    Image.fromarray(images[1].squeeze()).save(buffer, "BMP")
    encoded = [prepared.png(images[0].repeat(3, axis=2)), buffer.getvalue()]
    encoded += [prepared.png(image) for image in images[2:]]
    rows["image"] = [{"bytes": raw, "path": None} for raw in encoded]
    del rows["hsf_id"]
    for folder in ("leaf", "parquet/data"):
        (tmp_path / folder).mkdir(parents=True)
    prepared.write_leaf(tmp_path / "leaf" / "all_data_0.json", writers)
    prepared.write_parquet(tmp_path / "parquet/data/train-0.parquet", rows)
    read = {}
    for kind in ("leaf", "parquet"):
        prepare("femnist", str(tmp_path / "out" / kind), str(tmp_path / kind))
        read[kind] = load("femnist", tmp_path / "out" / kind)
    for field in ("samples", "labels", "groups"):
        np.testing.assert_array_equal(getattr(read["leaf"], field), getattr(read["parquet"], field))
    # Writers are numbered in the order of their names.
    assert set(read["leaf"].labels[read["leaf"].groups == 0]) == {35}
    assert sorted(read["leaf"].labels[read["leaf"].groups == 1]) == [0, 10, 61]


def change_row(column, value):
    def damage(folder):
        rows = prepared.femnist_rows(10, 2)
        rows[column][7] = value
        prepared.write_parquet(folder / "train.parquet", rows)

    return damage


def drop_column(folder):
    rows = prepared.femnist_rows(10, 2)
    del rows["writer_id"]
    prepared.write_parquet(folder / "train.parquet", rows)


def cut_parquet(folder):
    prepared.write_parquet(folder / "train.parquet", prepared.femnist_rows(10, 2))
    cut(folder / "train.parquet")


def leaf(change):
    def damage(folder):
        path = folder / "all_data_0.json"
        prepared.write_leaf(path, {"good": [1, 2], "other": [3]})
        content = json.loads(path.read_text())
        change(content["user_data"])
        path.write_text(json.dumps(content))

    return damage


def cut_leaf(folder):
    prepared.write_leaf(folder / "all_data_0.json", {"good": [1, 2]})
    cut(folder / "all_data_0.json")


SMALL_IMAGE = {"bytes": prepared.png(np.zeros((27, 28, 1), np.uint8)), "path": None}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_parquet, r"train.parquet: cannot be read as parquet"),
        (drop_column, r"train.parquet: no column 'writer_id', has image, hsf_id, character"),
        (change_row("character", 62), r"train.parquet row 7: label 62, must be in 0..61"),
        (change_row("character", None), r"train.parquet row 7: label None"),
        (change_row("writer_id", ""), r"train.parquet row 7: writer_id is '', must name"),
        (change_row("image", SMALL_IMAGE), "row 7: image is 28x27 pixels, must be 28x28"),
        (change_row("image", {"bytes": b"x", "path": None}), "row 7: image cannot be decoded"),
        (change_row("image", None), "row 7: image cannot be decoded"),
        (cut_leaf, r"all_data_0.json: cannot be read as LEAF's JSON"),
        (leaf(lambda data: data.pop("other")), "all_data_0.json: cannot be read as LEAF's JSON"),
        (
            leaf(lambda data: data["other"].update(x=[], y=[])),
            "all_data_0.json writer 'other': has no samples",
        ),
        (leaf(lambda data: data["other"].update(y=[62])), "writer 'other': label 62, must be in"),
        (leaf(lambda data: data["other"].update(y=[1, 2])), "writer 'other': x must be 2 lists"),
        (leaf(lambda data: data["other"]["x"][0].append(0.5)), "'other': x must be 1 lists of 784"),
        (leaf(lambda data: data["other"]["x"][0].__setitem__(5, 1.01)), "numbers in 0..1"),
        (lambda folder: (folder / "readme").touch(), r"no .parquet files of flwrlabs/femnist"),
    ],
)
def test_bad_femnist_files(tmp_path, damage, message):
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    damage(raw)
    with pytest.raises(ConfigError, match=message) as caught:
        prepare("femnist", str(out), str(raw))
    assert "\n" not in str(caught.value)
    assert not [path for path in out.rglob("*") if path.is_file()]
    with pytest.raises(ConfigError, match="femnist is not prepared there"):
        load("femnist", out)
    for path in raw.iterdir():
        path.unlink()
    prepared.write_parquet(raw / "train.parquet", prepared.femnist_rows(10, 2))
    prepare("femnist", str(out), str(raw))
    assert len(load("femnist", out).labels) == 10


# 20 Newsgroups


def test_newsgroups(small):
    texts = load("newsgroups", small)
    assert (len(texts.texts), texts.num_classes) == (300, 20)
    assert texts.class_names == CLASS_NAMES == tuple(sorted(CLASS_NAMES))
    sizes = {split: len(positions) for split, positions in texts.splits.items()}
    assert sizes == {"train": 150, "validation": 30, "distillation": 20, "test": 100}
    for text, label in zip(texts.texts, texts.labels, strict=True):
        assert set(text.split()) <= {"the", *(f"topic{label}word{i}" for i in range(8))}


POSTS = (
    "",
    "no header",
    "A: b\n\n",
    "A: b\n\nbody",
    "A: b\n\nbody\n\nmore body\n--\nname\n",
    "A: b\n\nbody\n\n\nname\n\n\n",
    "A: b\n\nbody\n\n> quoted where a footer stands",
    "A: b\n\n\n\nbody\n",
    "A: b\n\n----\nbody",
    "A: b\n\nIn article <1@x> y writes:\n> quoted\n| quoted\n : kept\nbody\n - - -\nname",
    "A: b\n\nJohn wrote:\nkept > kept\nQuoted from elsewhere\nx Quoted from y\n--- \n",
    "A: b\r\n\r\nbody\n\n--\nname",
)


@pytest.mark.parametrize("text", POSTS)
def test_texts_are_stripped_as_by_scikit_learn(text):
    from sklearn.datasets import _twenty_newsgroups as reference

    expected = reference.strip_newsgroup_quoting(
        reference.strip_newsgroup_footer(reference.strip_newsgroup_header(text))
    )
    assert newsgroups_builder.strip(text) == expected
    for own, theirs in (
        (newsgroups_builder.strip_header, reference.strip_newsgroup_header),
        (newsgroups_builder.strip_footer, reference.strip_newsgroup_footer),
        (newsgroups_builder.strip_quotes, reference.strip_newsgroup_quoting),
    ):
        assert own(text) == theirs(text)


def test_newsgroups_from_an_archive_and_from_a_folder(tmp_path):
    raw, unpacked = tmp_path / "raw", tmp_path / "unpacked"
    raw.mkdir()
    archive = raw / newsgroups_builder.ARCHIVE
    train = newsgroups_builder.FOLDERS["train"]
    more = {
        f"{train}/sci.med/900": b"A: b\n\ncaf\xe9",  # latin-1, not UTF-8
        f"{train}/sci.med/901": b"A: b\n\n> all quoted",
        "20news-bydate/readme": b"not a post",
    }
    prepared.write_archive(archive, train=40, test=20, more=more)
    with tarfile.open(archive) as opened:
        opened.extractall(unpacked, filter="data")
    read = []
    for folder in (raw, unpacked):
        prepare("newsgroups", str(tmp_path / "out" / folder.name), str(folder))
        read.append(load("newsgroups", tmp_path / "out" / folder.name))
    assert read[0].texts == read[1].texts
    np.testing.assert_array_equal(read[0].labels, read[1].labels)
    assert len(read[0].texts) == 62
    by_text = dict(zip(read[0].texts, read[0].labels, strict=True))
    assert by_text["café"] == by_text[""] == CLASS_NAMES.index("sci.med")


def whole_archive(folder, **options):
    path = folder / newsgroups_builder.ARCHIVE
    prepared.write_archive(path, **{"train": 40, "test": 20, **options})
    return path


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: cut(whole_archive(folder)), "20news-bydate.tar.gz: cannot be read"),
        (
            lambda folder: whole_archive(folder).write_bytes(b"no archive"),
            "20news-bydate.tar.gz: cannot be read",
        ),
        (
            lambda folder: whole_archive(folder, test=0),
            "20news-bydate.tar.gz: no posts in 20news-bydate-test",
        ),
        (
            lambda folder: whole_archive(folder, more={"20news-bydate-test/alt.cats/1": b""}),
            "20news-bydate-test/alt.cats/1 is in none of the 20 groups",
        ),
        (lambda folder: (folder / "readme").touch(), "holds neither 20news-bydate.tar.gz nor"),
    ],
)  # fmt: skip
def test_bad_newsgroups_files(tmp_path, damage, message):
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    damage(raw)
    with pytest.raises(ConfigError, match=message) as caught:
        prepare("newsgroups", str(out), str(raw))
    assert "\n" not in str(caught.value)
    assert not [path for path in out.rglob("*") if path.is_file()]
    whole_archive(raw)
    prepare("newsgroups", str(out), str(raw))
    assert len(load("newsgroups", out).texts) == 60


# Files that must not be read, and what are no files


def read_idx(folder):
    (folder / "t10k-labels-idx1-ubyte").touch()
    return folder, lambda: load("fashion_mnist", folder)


def read_prepared(folder):
    path = prepared.write_images("cifar10", folder, {"train": 6, "test": 3})
    return path.parent, lambda: load("cifar10", folder)


def read_shard(folder):
    path = prepared.write_images("cifar10", folder, {"train": 6, "test": 3})
    return shard(path), lambda: load("cifar10", folder)


def read_class(folder):
    write_folder(folder, {"a": 3, "b": 3})
    return folder / "a", lambda: load("image_folder", folder)


def read_image(folder):
    return read_class(folder)[0] / "00.png", lambda: load("image_folder", folder)


def read_rows(folder):
    write_texts(folder, {"a.jsonl": jsonl([("a", "x")])})
    return folder / "a.jsonl", lambda: load("text_folder", folder)


def read_raw_femnist(folder):
    prepared.write_parquet(folder / "train.parquet", prepared.femnist_rows(4, 2))
    return folder, lambda: list(femnist_builder.manual_rows(folder))


def read_raw_newsgroups(folder):
    group = folder / "20news-bydate-train" / "sci.med"
    group.mkdir(parents=True)
    return group, lambda: list(newsgroups_builder.posts(folder))


def read_manual(folder):
    (folder / "file").touch()
    return folder, lambda: prepare("femnist", str(folder / "out"), str(folder))


def read_trace(folder):
    path = folder / "trace.csv"
    path.write_text("download,train,upload\n1,2,3\n")
    return path, lambda: delays.create(Config(delays="trace", delay_trace=str(path)))


def read_sizes(folder):
    (folder / "config.json").touch()
    return folder, lambda: t5_weights.read_shape(str(folder))


def read_weights(folder):
    (folder / "model.safetensors").touch()
    return folder, lambda: t5_weights.read(str(folder), None)


def digest_weights(folder):
    (folder / "model.safetensors").touch()
    return folder / "model.safetensors", lambda: t5_weights.digest(str(folder))


def digest_tokenizer(folder):
    (folder / "spiece.model").touch()
    return folder / "spiece.model", lambda: tokens.digest(str(folder))


@pytest.mark.parametrize(
    "made",
    [
        read_idx, read_prepared, read_shard, read_class, read_image, read_rows, read_raw_femnist,
        read_raw_newsgroups, read_manual, read_trace, read_sizes, read_weights, digest_weights,
        digest_tokenizer,
    ],
)  # fmt: skip
def test_what_must_not_be_read_is_told(made):
    with tempfile.TemporaryDirectory() as outer:
        os.chmod(outer, 0o755)
        locked, read = made(Path(outer))
        locked.chmod(0)
        try:
            with nobody(), pytest.raises(ConfigError, match=r"annot be read .*Permission") as told:
                read()
        finally:
            locked.chmod(0o755)
    assert str(locked) in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("made", [read_image, read_rows, read_trace])
def test_what_is_no_file_is_not_waited_for(tmp_path, made):
    path, read = made(tmp_path)
    for make in (os.mkfifo, os.mkdir):
        path.unlink()
        make(path)
        with pytest.raises(ConfigError, match=r"is no file") as told:
            read()
        assert str(path) in str(told.value)
        if make is os.mkfifo:
            continue
        path.rmdir()
        path.symlink_to(tmp_path / "nowhere")
        with pytest.raises(ConfigError, match=r"leads nowhere|No such file") as told:
            read()
        assert str(path) in str(told.value)


# The command


def test_prepare_as_a_command(tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    prepared.write_parquet(raw / "train.parquet", prepared.femnist_rows(10, 2))
    arguments = ["--dataset=femnist", f"--data_dir={out}", f"--manual_dir={raw}"]
    command = [sys.executable, "-m", "experiments.prepare"]
    first = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
    last_line = first.stdout.splitlines()[-1]
    assert last_line == f"femnist is prepared in {out}/femnist/1.0.0: 10 train"
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = prepare("femnist", str(out), str(raw))
    assert again == f"femnist is prepared already in {out}/femnist/1.0.0: 10 train"
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == files
    bad = subprocess.run(
        [*command, "--dataset=digits"], capture_output=True, text=True, check=False
    )
    assert bad.returncode == 1
    assert bad.stderr == (
        "error: --dataset=digits: must be one of cifar10, cifar100, fashion_mnist, femnist, "
        "newsgroups\n"
    )


def test_preparing_again_tells_damage(tmp_path):
    folder = prepared.write_images("cifar10", tmp_path, {"train": 60, "test": 30})
    assert prepare("cifar10", str(tmp_path)).endswith("cifar10/3.0.2: 60 train, 30 test")
    cut(shard(folder))
    with pytest.raises(ConfigError, match=rf"damaged, .*; remove {folder} and prepare it again"):
        prepare("cifar10", str(tmp_path))


def test_what_prepare_needs(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="data_dir=: must name"):
        prepare("femnist", "")
    for folders in (("~nobody_here/a",), (str(tmp_path), "~nobody_here/a")):
        with pytest.raises(ConfigError, match=r"_dir=~nobody_here/a: must not name the home"):
            prepare("femnist", *folders)
    with pytest.raises(ConfigError, match=r"manual_dir=.*nowhere: no such folder"):
        prepare("femnist", str(tmp_path), str(tmp_path / "nowhere"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in IMAGES:
        with pytest.raises(ConfigError, match=r"takes TensorFlow, pip install -e '.\[tfds\]'"):
            prepare(name, str(tmp_path))


def test_a_download_that_fails(tmp_path, monkeypatch):
    from tensorflow_datasets.core.download import downloader

    # Nothing listens there; without the limit TFDS would try for minutes.
    monkeypatch.setattr(downloader, "MAX_RETRIES", 0)
    monkeypatch.setattr(femnist_builder, "URL", "http://127.0.0.1:9/train.parquet")
    with pytest.raises(ConfigError, match=r"dataset=femnist: cannot be prepared \(.*127") as caught:
        prepare("femnist", str(tmp_path))
    assert "\n" not in str(caught.value)
    assert "--manual_dir with The parquet files" in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if "tmp" in path.name or path.is_file()]


def test_a_download_with_another_content(tmp_path):
    archive = whole_archive(tmp_path)
    with pytest.raises(ConfigError, match="SHA-256 of the download is"):
        newsgroups_builder._checked(archive)
    assert not archive.exists()


def cifar_archive(path, batches=("data_batch_1", "test_batch")):
    """An archive laid out as cifar-10-binary.tar.gz, 20 images a file."""
    labels = np.arange(20, dtype=np.uint8) % 10
    pixels = prepared.images(labels, (32, 32, 3)).transpose(0, 3, 1, 2).reshape(20, -1)
    records = np.concatenate([labels[:, None], pixels], axis=1).tobytes()
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    files = {"batches.meta.txt": "\n".join(f"class{i}" for i in range(10)).encode()}
    files |= dict.fromkeys(names, records)
    with tarfile.open(path, "w:gz") as archive:
        for name, raw in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))


def test_cifar10_through_tfds_own_builder(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow", reason="TFDS's own image builders encode with TensorFlow")
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import checksums

    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    archive = raw / "cifar-10-binary.tar.gz"
    cifar_archive(archive)
    # The builder checks the archive's checksum, so it is told that of the made-up one.
    original = tfds.builder_cls("cifar10")
    (url,) = original.url_infos
    known = {url: checksums.compute_url_info(archive)}
    monkeypatch.setattr(original, "url_infos", known)

    whole = archive.read_bytes()
    cut(archive)
    with pytest.raises(ConfigError, match=r"cifar-10-binary.tar.gz, has wrong checksum") as caught:
        prepare("cifar10", str(out), str(raw))
    assert "\n" not in str(caught.value)
    assert not tfds_reader.version_folders("cifar10", str(out))

    archive.write_bytes(whole)
    assert prepare("cifar10", str(out), str(raw)).endswith("100 train, 20 test")
    dataset = load("cifar10", out)
    np.testing.assert_array_equal(nearest_pattern(dataset), dataset.labels)
    expected = prepared.images(np.arange(20) % 10, (32, 32, 3))
    for image, label in zip(dataset.samples, dataset.labels, strict=True):
        assert (image == expected[label]).all() or (image == expected[label + 10]).all()


# A user's own images


def write_folder(folder, counts, shape=(6, 5), mode="L"):
    """`counts`: relative class folder -> number of images."""
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        path = Path(folder, name)
        path.mkdir(parents=True)
        for i in range(count):
            size = (*shape, len(mode)) if len(mode) > 1 else shape
            image = Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8))
            image.save(path / f"{i:02}.png")


def test_image_folder_with_a_test_part(tmp_path):
    write_folder(tmp_path, {"train/b": 8, "train/a": 12, "test/a": 3})
    (tmp_path / "train" / "b" / ".hidden").write_bytes(b"")
    (tmp_path / ".git").mkdir()
    dataset = load("image_folder", tmp_path)
    assert dataset.samples.shape == (23, 6, 5, 1)
    assert dataset.num_classes == 2
    assert dataset.class_names == ("a", "b")
    assert dataset.labels.tolist() == [0] * 12 + [1] * 8 + [0] * 3
    assert dataset.splits["test"].tolist() == [20, 21, 22]
    assert sorted(np.concatenate(list(dataset.splits.values()))) == list(range(23))
    first = np.asarray(Image.open(tmp_path / "train" / "a" / "00.png"))
    np.testing.assert_array_equal(dataset.samples[0, ..., 0], first)


def test_image_folder_without_a_test_part(tmp_path):
    write_folder(tmp_path, {"many": 20, "some": 5, "one": 1})
    (tmp_path / "readme.txt").write_text("beside the classes")
    dataset = load("image_folder", tmp_path)
    test = dataset.splits["test"]
    # many, one, some in alphabetical order; a fifth of each.
    assert np.bincount(dataset.labels[test], minlength=3).tolist() == [4, 0, 1]
    assert 1 in dataset.labels[: test[0]]
    other = load("image_folder", tmp_path, seed=1)
    np.testing.assert_array_equal(dataset.samples[test], other.samples[other.splits["test"]])
    assert (dataset.splits["train"] != other.splits["train"]).any()


def test_image_folder_colours(tmp_path):
    write_folder(tmp_path, {"grey": 4, "b": 4})
    write_folder(tmp_path, {"colour": 4}, mode="RGB")
    dataset = load("image_folder", tmp_path)
    assert dataset.samples.shape == (12, 6, 5, 3)
    grey = dataset.samples[dataset.labels != 1]
    assert (grey == grey[..., :1]).all()
    assert (dataset.samples[dataset.labels == 1].std(axis=-1) > 0).any()
    first = np.asarray(Image.open(tmp_path / "b" / "00.png"))
    assert (dataset.samples[..., 0] == first).all(axis=(1, 2)).any()  # read before any colour


def own_size(folder):
    Image.new("L", (9, 9)).save(folder / "train" / "a" / "odd.png")


def own_depth(folder):
    Image.fromarray(np.zeros((6, 5), np.uint16)).save(folder / "train" / "a" / "deep.png")


def truncated(folder):
    path = folder / "train" / "a" / "00.png"
    path.write_bytes(path.read_bytes()[:-30])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (own_size, r"a/odd.png: is 9x9 pixels, must be 5x6 as .*train/a/00.png"),
        (own_depth, r"a/deep.png: pixels are I;16 of 16 bits, must be grey or RGB of 8 bits"),
        (truncated, r"a/00.png: cannot be read as an image"),
        (lambda f: (f / "train/b/x.txt").write_text("no"), r"b/x.txt: cannot be read as an image"),
        (lambda f: (f / "train/b/deeper").mkdir(), r"b/deeper: cannot be read as an image"),
        (lambda f: (f / "train/c").mkdir(), r"train/c: holds no files"),
        (lambda f: write_folder(f, {"test/c": 1}), r"test/c/00.png: class 'c' has no training"),
        (lambda f: (f / "test").rename(f / "away"), "has a folder 'train' but no folder 'test'"),
        (lambda f: (f / "train").rename(f / "away"), "has a folder 'test' but no folder 'train'"),
        (
            lambda f: (f / "train/c").symlink_to(f / "nowhere"),
            r"train/c: is a link that leads nowhere",
        ),
        (
            lambda f: (f / "train/b").rename(f / "away"),
            r"holds the classes \['a'\], must hold two or more",
        ),
    ],
)
def test_bad_image_folders(tmp_path, damage, message):
    write_folder(tmp_path, {"train/a": 3, "train/b": 2, "test/a": 1})
    load("image_folder", tmp_path)
    damage(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load("image_folder", tmp_path)


@pytest.mark.parametrize("source", [image_folder, text_folder])
def test_folders_that_are_none(tmp_path, source):
    with pytest.raises(ConfigError, match="data_dir=: must name the folder with"):
        source.load("", 0)
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        source.load(str(tmp_path / "nowhere"), 0)
    with pytest.raises(ConfigError, match="holds no folders, must hold one for each class"):
        source.load(str(tmp_path), 0)


def test_too_little_for_a_test_part(tmp_path):
    write_folder(tmp_path, {"a": 2, "b": 1})
    with pytest.raises(ConfigError, match="no class holds the three samples"):
        load("image_folder", tmp_path)


# A user's own texts


def write_texts(folder, texts):
    """`texts`: relative path -> text."""
    for name, text in texts.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def jsonl(rows):
    return "".join(json.dumps({"label": a, "text": b}, ensure_ascii=False) + "\n" for a, b in rows)


def test_text_folder_with_files(tmp_path):
    texts = {f"{name}/{i}.txt": f"{name} {i} \u2028 é" for name in "ba" for i in range(10)}
    write_texts(tmp_path, texts)
    read = load("text_folder", tmp_path)
    assert read.class_names == ("a", "b")
    assert sorted(read.texts) == sorted(texts.values())
    assert all(text[0] == "ab"[label] for text, label in zip(read.texts, read.labels, strict=True))
    assert len(read.splits["test"]) == 4
    # The same texts with a test part of their own.
    write_texts(tmp_path / "parts", {f"train/{name}": text for name, text in texts.items()})
    write_texts(tmp_path / "parts", {"test/a/0.txt": "\ufeffa mark of byte order"})
    parts = load("text_folder", tmp_path / "parts")
    assert parts.texts[-1] == "a mark of byte order"
    assert parts.splits["test"].tolist() == [20]


def test_text_folder_with_json_lines(tmp_path):
    rows = [("ab"[i % 2], f"text {i} \u2028 é") for i in range(20)]
    write_texts(tmp_path, {"some.jsonl": jsonl(rows[:7]), "more.jsonl": "\n" + jsonl(rows[7:])})
    read = load("text_folder", tmp_path)
    assert sorted(read.texts) == sorted(text for _, text in rows)
    assert len(read.splits["test"]) == 4
    other = load("text_folder", tmp_path, seed=1)
    assert read.texts == other.texts  # the test part is the same for all seeds
    write_texts(tmp_path, {"test.jsonl": jsonl([("b", "last")])})
    read = load("text_folder", tmp_path)
    assert (read.texts[-1], read.labels[-1]) == ("last", 1)
    assert read.splits["test"].tolist() == [20]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a/bad.txt", b"caf\xe9", r"a/bad.txt: is not UTF-8 text"),
        ("a/bad.txt", b"", r"a/bad.txt: holds no text"),
        ("a/bad.txt", b" \n\t", r"a/bad.txt: holds no text"),
        ("a/bad.pdf", b"text", r"a/bad.pdf: must be a .txt file"),
        ("bad.jsonl", b'{"label": "a", "text": "x"}\n{"label": "a",', r"bad.jsonl line 2: is not"),
        ("bad.jsonl", b'\n["a", "x"]', r"bad.jsonl line 2: must hold a 'label'"),
        ("bad.jsonl", b'{"label": "a"}', r"bad.jsonl line 1: must hold a 'text'"),
        ("bad.jsonl", b'{"label": 1, "text": "x"}', r"line 1: must hold a 'label' that is a text"),
        ("bad.jsonl", b'{"label": "a", "text": " "}', r"line 1: must hold a 'text' that is a text"),
        ("bad.jsonl", b'{"label": "a", "text": "caf\xe9"}', r"line 1: is not UTF-8 text"),
        ("bad.jsonl", b"\n\n", r"bad.jsonl: holds no texts"),
        ("test.jsonl", b'{"label": "a", "text": "x"}', "no training texts"),
    ],
)  # fmt: skip
def test_bad_texts(tmp_path, name, content, message):
    write_texts(tmp_path, {f"{label}/{i}.txt": "text" for label in "ab" for i in range(3)})
    load("text_folder", tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load("text_folder", tmp_path)


def test_a_class_that_only_the_test_part_has(tmp_path):
    rows = jsonl([("a", "x"), ("b", "y")])
    write_texts(tmp_path, {"train.jsonl": rows, "test.jsonl": rows + jsonl([("c", "z")])})
    with pytest.raises(ConfigError, match=r"test.jsonl line 3: class 'c' has no training sample"):
        load("text_folder", tmp_path)


# What a viewer shows is what is trained on


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def shown(tmp_path, encoded):
    path = tmp_path / "image"
    path.write_bytes(encoded)
    return pixels.read(path).squeeze()


def image_of(rows):
    return Image.fromarray(np.asarray(rows, np.uint8))


def palette(colours, indices):
    image = Image.new("P", (len(indices), 1))
    image.putpalette(sum(colours, ()))
    image.putdata(indices)
    return image


def chunk(kind, content=b""):
    """A chunk of a PNG file."""
    body = kind + content
    return len(content).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")


def with_gamma(encoded, gamma):
    at = encoded.index(b"IDAT") - 4
    return encoded[:at] + chunk(b"gAMA", round(gamma * 1e5).to_bytes(4, "big")) + encoded[at:]


# 40% of red 100 on white: 0.4 x 100 + 0.6 x 255 = 193.
CLEAR = [
    (image_of([[[100, 0, 0, 102]]]), {}, [193, 153, 153]),
    (image_of([[[0, 0, 0, 0]]]), {}, [255, 255, 255]),
    (image_of([[[9, 8, 7, 255]]]), {}, [9, 8, 7]),
    (image_of([[[100, 102]]]), {}, 193),
    (image_of([[100]]), {"transparency": 100}, 255),
    (image_of([[100]]), {"transparency": 99}, 100),
    (image_of([[[1, 2, 3]]]), {"transparency": (1, 2, 3)}, [255, 255, 255]),
    (palette([(5, 5, 5), (100, 0, 0)], [1]), {"transparency": bytes([255, 102])}, [193, 153, 153]),
    (palette([(5, 5, 5), (100, 0, 0)], [1]), {"transparency": 1}, [255, 255, 255]),
    (palette([(5, 5, 5), (100, 0, 0)], [1]), {}, [100, 0, 0]),
    (Image.new("1", (1, 1), 1), {}, 255),
]


@pytest.mark.parametrize(("image", "options", "expected"), CLEAR)
def test_transparent_images_are_put_on_white(tmp_path, image, options, expected):
    assert shown(tmp_path, encode(image, **options)).tolist() == expected
    if image.mode == "RGBA":
        for kind in ("TIFF", "WEBP"):
            assert shown(tmp_path, encode(image, kind, lossless=True)).tolist() == expected


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_exif_says(tmp_path, kind, orientation):
    upright = np.kron([[0, 90, 255], [160, 40, 200]], np.ones((16, 16))).astype(np.uint8)
    # How an image must lie in the file to be shown upright, by the table of EXIF's tag 274: where
    # the file's first row and first column are shown.
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.T, 6: upright.T[::-1], 7: upright.T[::-1, ::-1], 8: upright.T[:, ::-1],
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[274] = orientation
    options = {"exif": exif, "lossless": True, "quality": 95}
    found = shown(tmp_path, encode(image_of(stored), kind, **options)).astype(int)
    found = found if found.ndim == 2 else found[..., 0]
    assert found.shape == upright.shape
    np.testing.assert_allclose(found, upright, atol=4 if kind == "JPEG" else 0)  # JPEG's rounding


def test_sizes_are_compared_as_shown(tmp_path):
    write_folder(tmp_path, {"a": 4, "b": 4}, shape=(6, 5))
    exif = Image.Exif()
    exif[274] = 6
    lying = image_of(np.arange(30).reshape(5, 6))
    (tmp_path / "a" / "lying.png").write_bytes(encode(lying, exif=exif))
    assert load("image_folder", tmp_path).samples.shape == (9, 6, 5, 1)


def two_frames(kind):
    return encode(
        image_of([[0] * 4] * 4), kind, save_all=True, append_images=[image_of([[255] * 4] * 4)]
    )


def test_a_telephones_photograph_shows_its_first_picture(tmp_path):
    assert (shown(tmp_path, two_frames("MPO")) == 0).all()


DEEP = b"\x12\x34" * 3
DEEP_PNG = (  # one pixel of 16 bits a channel; Pillow writes none
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", bytes([0, 0, 0, 1, 0, 0, 0, 1, 16, 2, 0, 0, 0]))
    + chunk(b"IDAT", zlib.compress(b"\0" + DEEP))
    + chunk(b"IEND")
)


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        *((two_frames(kind), "holds 2 frames") for kind in ("GIF", "TIFF", "PNG", "WEBP")),
        (encode(Image.new("I;16", (1, 1))), "are I;16 of 16 bits, must be grey or RGB of 8 bits"),
        (encode(Image.new("I;16", (1, 1)), "TIFF"), "pixels are I;16 of 16 bits"),
        (encode(Image.new("F", (1, 1)), "TIFF"), "pixels are F of 32 bits"),
        (DEEP_PNG, "pixels are RGB of 16 bits"),
        (b"P6 1 1 65535\n" + DEEP, "pixels are RGB of 16 bits"),
        (b"P5 1 1 4095\n" + DEEP[:2], "must be grey or RGB of 8 bits"),
        (encode(Image.new("CMYK", (8, 8)), "JPEG"), "are CMYK without a colour profile"),
        (encode(Image.new("LAB", (1, 1)), "TIFF"), "pixels are LAB, must be"),
        (with_gamma(encode(image_of([[9]])), 1.0), "has gamma 1, must have that of sRGB, 0.4545"),
        (encode(image_of([[9]]), icc_profile=b"none"), "colour profile cannot be applied"),
    ],
)
def test_images_that_are_not_shown_in_one_way_are_refused(tmp_path, encoded, message):
    with pytest.raises(ConfigError, match=message) as caught:
        shown(tmp_path, encoded)
    assert str(caught.value).startswith(f"{tmp_path}/image: ")
    assert "\n" not in str(caught.value)


def test_the_gamma_of_srgb_is_accepted(tmp_path):
    assert shown(tmp_path, with_gamma(encode(image_of([[9]])), 0.45455)) == 9


def test_colour_profiles_are_applied(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image, grey = image_of([[[200, 30, 60]]]), image_of([[200]])
    assert shown(tmp_path, encode(image, icc_profile=srgb)).tolist() == [200, 30, 60]
    assert shown(tmp_path, encode(grey, icc_profile=srgb)) == 200
    # The tags of red and blue changed places, and so did the colours that are shown.
    red, blue = srgb.index(b"rXYZ"), srgb.index(b"bXYZ")
    swapped = bytearray(srgb)
    swapped[red + 4 : red + 8], swapped[blue + 4 : blue + 8] = (
        srgb[blue + 4 : blue + 8], srgb[red + 4 : red + 8],
    )  # fmt: skip
    swapped = bytes(swapped).replace(b"s\0R\0G\0B", b"o\0t\0h\0e").replace(b"sRGB", b"othe")
    for other, expected in (
        (image, [60, 30, 200]),
        (image_of([[[200, 30, 60, 255]]]), [60, 30, 200]),
        (image_of([[[200, 30, 60, 0]]]), [255, 255, 255]),
        (grey, 200),
    ):
        found = shown(tmp_path, encode(other, icc_profile=swapped)).astype(int)
        np.testing.assert_allclose(found, expected, atol=1)  # rounding of the profile's tables


# Names of classes and of parts, the same for both of the user's sources


def write_samples(source, folder, names):
    """One sample in each of the class folders `names`, given with their parts."""
    for number, name in enumerate(names):
        path = Path(folder, name)
        path.mkdir(parents=True, exist_ok=True)
        if source == "text_folder":
            (path / f"{number}.txt").write_text(ascii(name))
        else:
            Image.new("L", (2, 2), number).save(path / f"{number}.png")


PARTS = ("train", "validation", "test")
SOURCES = pytest.mark.parametrize("source", ["image_folder", "text_folder"])


@SOURCES
def test_classes_are_in_the_order_of_numbers(tmp_path, source):
    count_to_eleven = [str(number) for number in range(12)]
    write_samples(source, tmp_path, [f"{part}/{c}" for part in PARTS for c in count_to_eleven])
    loaded = load(source, tmp_path)
    assert loaded.class_names == tuple(count_to_eleven)
    assert loaded.labels.tolist() == 3 * sorted(range(12), key=str)  # as the folders are read


def test_natural_order():
    shuffled = ["b10", "10", "b2", "-1", "9", "café", "b", "B", "010", "b2x10", "b2x9", "9" * 5000]
    assert names.ordered([*shuffled, "b"]) == [
        "-1", "9", "010", "10", "9" * 5000, "B", "b", "b2", "b2x9", "b2x10", "b10", "café",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("label", "classes", "number"),
    [
        (2, [str(n) for n in range(12)], 2),
        ("10", ["2", "10"], 1),
        (10, ["2", "10"], 1),  # the class, not a place
        (1, ["3", "2", "1"], 2),
        (1, ["ant", "bee"], 1),
        (" cafe\u0301", ["ant", "caf\xe9"], 1),
        (0, ["1", "2"], "must be a class name; the classes are 1, 2"),
        (2, ["ant", "bee"], "must be a class name or 0..1"),
        (True, ["ant", "bee"], "must be a class name"),
        ("1", ["ant", "bee"], "must be a class name"),
        ("a", ["a", "a "], "is the name of 2 classes"),
    ],
)
def test_what_a_label_means(label, classes, number):
    if isinstance(number, int):
        assert names.label_of(label, classes) == number
    else:
        with pytest.raises(ValueError, match=number):
            names.label_of(label, classes)


@SOURCES
@pytest.mark.parametrize("other", ["a ", "a\u00a0", "\u200ba", "cafe\u0301", "ice  cream"])
def test_names_that_look_alike_are_refused(tmp_path, source, other):
    own = {"cafe\u0301": "caf\xe9", "ice  cream": "ice cream"}.get(other, "a")
    write_samples(source, tmp_path, [f"train/{own}", "train/b", f"test/{other}"])
    # Told in ASCII, or they would look alike in the message, too.
    message = f"class {other!a} looks like class {own!a} of {tmp_path}/train/"
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(source, tmp_path)
    write_samples(source, tmp_path / "own", [f"train/{other}", "train/A", f"test/{other}"])
    wanted = {"\u200ba": ("A", "\u200ba"), "ice  cream": ("A", "ice  cream")}.get(other, ("A", own))
    assert load(source, tmp_path / "own").class_names == wanted


def test_labels_that_look_alike_are_refused(tmp_path):
    write_texts(tmp_path, {"some.jsonl": jsonl([("a", "x"), ("b", "y"), ("a ", "z")])})
    with pytest.raises(ConfigError, match=r"line 3: class 'a ' looks like class 'a' of .* line 1"):
        load("text_folder", tmp_path)


@pytest.mark.parametrize("name", [" ", b"caf\xe9".decode("utf-8", "surrogateescape")])
def test_names_that_are_none(tmp_path, name):
    write_samples("text_folder", tmp_path, [f"train/{name}", "train/b", "test/b"])
    with pytest.raises(ConfigError, match=r"the name of its class, '.*', is (empty|not valid)"):
        load("text_folder", tmp_path)


LOOK_ALIKES = ("Test", "testing", "val", "Validation", "valid2", "dev_set", "Train", "train_images")


@SOURCES
@pytest.mark.parametrize("name", LOOK_ALIKES)
@pytest.mark.parametrize("others", [["a", "b"], ["train/a", "train/b", "test/a"]])
def test_folders_that_look_like_parts_are_refused(tmp_path, source, name, others):
    write_samples(source, tmp_path, [*others, f"{name}/a"])
    wanted = f"{name}: looks like a part of the data; the parts are named train, test, validation"
    with pytest.raises(ConfigError, match=wanted):
        load(source, tmp_path)


@SOURCES
def test_inside_the_parts_a_class_may_have_any_name(tmp_path, source):
    write_samples(source, tmp_path, ["train/valid", "train/test", "test/valid", "away/c"])
    assert load(source, tmp_path).class_names == ("test", "valid")


@pytest.mark.parametrize("name", [*LOOK_ALIKES[:7], "reviews-test", "val-00000-of-00001"])
def test_files_that_look_like_parts_are_refused(tmp_path, name):
    rows = jsonl([("a", "x"), ("b", "y")] * 3)
    write_texts(tmp_path, {"train-1.jsonl": rows, "more.jsonl": rows, "readme.txt": "no data"})
    assert len(load("text_folder", tmp_path).texts) == 12
    write_texts(tmp_path, {f"{name}.jsonl": rows})
    with pytest.raises(ConfigError, match=f"{name}.jsonl: looks like a part of the data; the"):
        load("text_folder", tmp_path)


@pytest.mark.parametrize(
    "name", ["test.json", "validation/x", "Test.csv", "dev.jsonl.gz", "a.JSONL"]
)
def test_what_lies_beside_files_of_rows(tmp_path, name):
    write_texts(tmp_path, {"train.jsonl": jsonl([("a", "x"), ("b", "y")] * 3), name: "{}"})
    with pytest.raises(ConfigError, match=r"looks like a part of|is beside texts in .jsonl files"):
        load("text_folder", tmp_path)


def check_validation(loaded, expected):
    assert {name: len(part) for name, part in loaded.splits.items()} == expected
    assert loaded.splits["validation"].tolist() == [20, 21]
    assert sorted(np.concatenate(list(loaded.splits.values()))) == list(range(len(loaded.labels)))


@SOURCES
def test_a_validation_part_is_the_validation_split(tmp_path, source):
    train = [f"train/{c}" for c in "ab" for _ in range(10)]
    write_samples(source, tmp_path, [*train, "validation/a", "validation/b", "test/a"])
    loaded = load(source, tmp_path)
    check_validation(loaded, {"train": 18, "distillation": 2, "validation": 2, "test": 1})
    if source == "text_folder":
        assert loaded.texts[20:] == ["'validation/a'", "'validation/b'", "'test/a'"]
    write_samples(source, tmp_path, ["validation/c"])
    with pytest.raises(ConfigError, match="class 'c' has no training sample"):
        load(source, tmp_path)


def test_a_validation_file_is_the_validation_split(tmp_path):
    rows = [("ab"[i % 2], f"text {i}") for i in range(20)]
    write_texts(tmp_path, {"train.jsonl": jsonl(rows), "test.jsonl": jsonl(rows[:1])})
    write_texts(tmp_path, {"validation.jsonl": jsonl([("a", "own a"), ("b", "own b")])})
    loaded = load("text_folder", tmp_path)
    check_validation(loaded, {"train": 18, "distillation": 2, "validation": 2, "test": 1})
    assert [loaded.texts[i] for i in (20, 21)] == ["own a", "own b"]


def test_every_class_has_a_training_sample_and_its_share_of_each_split():
    # Of 100 samples, a class of 80, one of 18, two of one: by chance one may be missing.
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], [80, 18, 1, 1]))
    sizes = {"train": 75, "validation": 15, "distillation": 10}
    seen = []
    for seed in range(20):
        splits = split_by_class(labels, sizes, seed)
        assert sorted(np.concatenate(list(splits.values()))) == list(range(100))
        assert {name: len(part) for name, part in splits.items()} == sizes
        counts = {name: np.bincount(labels[part], minlength=4) for name, part in splits.items()}
        assert (counts["train"][2:] == 1).all()
        for name, size in sizes.items():
            # 80 and 18 of each 100, but for the places at the two ends of a cut, and for the rare.
            np.testing.assert_allclose(counts[name][:2], [size * 0.8, size * 0.18], atol=2)
        seen.append(splits["train"].tolist())
    assert len(set(map(tuple, seen))) == 20
    # Where each class has one sample, there are as many as fit.
    splits = split_by_class(np.arange(100), sizes, 0)
    assert [len(part) for part in splits.values()] == [75, 15, 10]


def test_texts_are_checked_when_they_are_made():
    splits = dict.fromkeys(("validation", "distillation", "test"), np.arange(1))
    splits["train"] = np.arange(1, 2)
    splits["distillation"] = np.arange(0)
    good = {"labels": np.arange(2, dtype=np.int32), "splits": splits}
    assert Texts("good", ("a", "b"), ["x", ""], **good).num_classes == 2
    with pytest.raises(ValueError, match="3 samples, 2 labels"):
        Texts("bad", ("a", "b"), ["x", "y", "z"], **good)
    with pytest.raises(ValueError, match=r"labels outside 0..0"):
        Texts("bad", ("a",), ["x", "y"], **good)
    del splits["test"]
    with pytest.raises(ValueError, match="no split 'test'"):
        Texts("bad", ("a", "b"), ["x", "y"], **good)


# Rotation


def test_quarter_turns_are_exact():
    image = jnp.arange(5 * 5 * 2, dtype=jnp.uint8).reshape(5, 5, 2)
    for size in (5, 4):
        square = image[:size, :size]
        for turns in range(4):
            np.testing.assert_array_equal(
                augment.rotate(square, jnp.float32(90 * turns)), np.rot90(square, turns)
            )


@pytest.mark.parametrize("degrees", [-15.0, -4.0, 7.5, 15.0])
def test_rotation_as_pillow_does_it(degrees):
    image = np.random.default_rng(0).integers(1, 256, (32, 32), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(image).rotate(degrees, Image.Resampling.NEAREST))
    ours = np.asarray(augment.rotate(jnp.asarray(image[..., None]), jnp.float32(degrees)))[..., 0]
    # Pixels that come from halfway between two may fall to either side.
    assert (ours == expected).mean() > 0.99
    assert (np.asarray(Image.fromarray(image).rotate(-degrees)) == ours).mean() < 0.5


@pytest.mark.parametrize("inputs", [augment.client_inputs, augment.synthetic_inputs])
def test_rotation_comes_after_crop_and_flip(inputs):
    images = jnp.asarray(prepared.images(np.arange(8) % 4, (32, 32, 3)))
    plain = Preprocessing(crop_padding=4, flip=True, mean=(0.5,) * 3, std=(0.25,) * 3)
    turned = Preprocessing(
        crop_padding=4, flip=True, rotation=15.0, mean=(0.5,) * 3, std=(0.25,) * 3
    )
    key = jax.random.key(0)
    before, after = (inputs(images, key, how) for how in (plain, turned))
    assert (before != after).mean() > 0.1
    assert after.min() == -2.0  # zero, normalised: filled before normalisation
    # The draws of crop and flip are those without rotation: the middle hardly moves.
    centre = (slice(None), slice(15, 17), slice(15, 17))
    np.testing.assert_array_equal(before[centre], after[centre])


def test_angles_are_drawn_per_sample_within_the_limit():
    # One bright pixel 10 above the centre of 21 x 21 tells the angle by where it goes.
    image = np.zeros((21, 21, 1), np.uint8)
    image[0, 10] = 255
    images = jnp.asarray(image)[None].repeat(2000, axis=0)
    turned = augment.client_inputs(images, jax.random.key(0), Preprocessing(rotation=15.0))
    _, _, columns, _ = np.nonzero(np.asarray(turned))
    # 10 sin(15 degrees) = 2.6, to the nearest pixel: no further than 3, and all in between.
    assert set(columns - 10) == {-3, -2, -1, 0, 1, 2, 3}
    assert abs((columns - 10).mean()) < 0.15  # 4 standard deviations of 1.6 / sqrt(2000)
