"""Sources, splits and augmentation; every kind of bad file gets one clear line."""

import dataclasses
import gzip
import os
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrevive_jax import data, models
from fedrevive_jax.config import DATASETS, METHODS, MODELS
from fedrevive_jax.data import augment, digits, fashion_mnist
from fedrevive_jax.data.dataset import Preprocessing, split_training, warn_of_missing_classes
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.presets import BY_DATASET, BY_METHOD
from fedrevive_jax.simulation.simulator import Simulation
from tests.toys import small


def test_names_agree_everywhere():
    assert {*data.SOURCES, "custom"} == set(DATASETS) == set(BY_DATASET)
    assert {*models.NETWORKS, "t5", "custom"} == set(MODELS)
    assert set(METHODS) == set(BY_METHOD)


def test_digits():
    dataset = digits.load("", 0)
    assert dataset.samples.shape == (1797, 8, 8, 1)
    assert dataset.samples.max() == 255
    splits = dataset.splits
    assert sorted(np.concatenate(list(splits.values()))) == list(range(1797))
    assert len(splits["test"]) == 360
    assert np.bincount(dataset.labels[splits["test"]]).min() >= 34
    other = digits.load("", 1)
    np.testing.assert_array_equal(
        dataset.samples[splits["test"]], other.samples[other.splits["test"]]
    )
    assert (splits["train"] != other.splits["train"]).any()


def test_digits_do_not_import_tfds():
    code = (
        "import sys; from fedrevive_jax.data import digits; digits.load('', 0);"
        "assert not {'tensorflow_datasets', 'tensorflow', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_specs_tell_the_truth(idx_folder):
    for module, folder in ((digits, ""), (fashion_mnist, str(idx_folder))):
        dataset = module.load(folder, 0)
        assert module.SPEC.input_shape == dataset.input_shape
        assert module.SPEC.num_classes == dataset.num_classes
    assert digits.SPEC.training_samples == 1797 - 360


def test_classes_without_samples_are_told(caplog):
    labels = np.asarray([0, 1, 3, 0, 1, 0], np.int32)
    ends = {"train": [0, 1, 2], "validation": [], "distillation": [], "test": [3, 4, 5]}
    splits = {name: np.asarray(part, np.int32) for name, part in ends.items()}
    samples = np.zeros((6, 1, 1, 1), np.uint8)
    dataset = data.Dataset("mine", 4, samples, labels, splits, class_names=tuple("abcd"))
    warn_of_missing_classes(dataset)
    assert caplog.messages == [
        "data set mine: 1 of 4 classes without a sample in the split 'train' ('c'); none can be "
        "learnt",
        "data set mine: 2 of 4 classes without a sample in the split 'test' ('c', 'd'); none is "
        "tested",
    ]
    caplog.clear()
    dataset = digits.load("", 0)
    train = dataset.splits["train"]
    splits = {**dataset.splits, "train": train[dataset.labels[train] != 3]}
    Simulation(small("fedbuff"), dataset)
    assert not caplog.messages
    Simulation(small("fedbuff"), dataclasses.replace(dataset, splits=splits))
    (told,) = caplog.messages
    assert "1 of 10 classes without a sample in the split 'train' ('3')" in told


def good_arrays():
    parts = ("train", "validation", "distillation", "test")
    return {
        "samples": np.zeros((4, 4, 4, 1), np.uint8),
        "labels": np.arange(4, dtype=np.int32),
        "splits": {name: np.asarray([i]) for i, name in enumerate(parts)},
    }


def split_as(name, positions):
    return {"splits": {**good_arrays()["splits"], name: positions}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"samples": np.zeros((4, 4, 4, 1))},
            r"samples must be uint8 .*; are float64 \[4, 4, 4, 1\]",
        ),
        ({"samples": np.zeros((4, 4, 4), np.uint8)}, r"samples must be .*; are uint8 \[4, 4, 4\]"),
        ({"samples": [[0]]}, "samples must be uint8 .*; are a list"),
        ({"samples": np.full((4, 2), -1, np.int32)}, "token ids must be at least 0; one is -1"),
        ({"samples": np.zeros((5, 4, 4, 1), np.uint8)}, "5 samples, 4 labels"),
        ({"labels": np.arange(4)}, r"labels must be int32 \[n\].*; are int64 \[4\]"),
        (
            {"labels": np.eye(4, dtype=np.int32)},
            r"labels must be int32 \[n\].*; are int32 \[4, 4\]",
        ),
        (
            {"labels": np.zeros((4, 1), np.int32)},
            r"labels must be int32 \[n\].*; are int32 \[4, 1\]",
        ),
        ({"labels": [0, 1, 2, 3]}, r"labels must be int32 \[n\].*; are a list"),
        ({"labels": np.arange(4.0)}, r"labels must be int32 \[n\].*; are float64 \[4\]"),
        ({"labels": np.arange(1, 5, dtype=np.int32)}, r"labels outside 0\.\.3; one is 4"),
        ({"splits": {"train": np.arange(4)}}, "no split 'validation'; there must be train, val"),
        ({"splits": [np.arange(4)]}, "splits must be a dict of train, .*; is a list"),
        (split_as("train", np.asarray([0.0])), r"split 'train' must be .*; is float64 \[1\]"),
        (split_as("train", [0]), "split 'train' must be whole numbers .*; is a list"),
        (
            split_as("train", np.asarray([True, False, False, False])),
            r"split 'train' must be .*; is bool \[4\]; np.flatnonzero gives them",
        ),
        (split_as("train", np.asarray([[0]])), r"split 'train' must be .*; is int64 \[1, 1\]"),
        (split_as("train", np.asarray([0, 3])), "1 samples of test are in train, too, such as 3"),
        (split_as("train", np.arange(2)), "1 samples of validation are in train, too, such as 1"),
        (split_as("distillation", np.asarray([3])), "of test are in distillation, too, such as 3"),
        ({"groups": np.arange(3)}, r"groups must be whole numbers \[4\]; are int64 \[3\]"),
        ({"class_names": ("a", "b")}, "class_names must be 4 names, one a class; are 2"),
        ({"class_names": (0, 1, 2, 3)}, "class_names must be texts; one is 0"),
        (
            {"class_names": ("a", "b", "c", os.fsdecode(b"caf\xe9"))},
            r"class 'caf\\udce9' cannot be read in this locale; PYTHONUTF8=1",
        ),
        (
            {"preprocessing": data.Preprocessing(mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0))},
            "mean and std must have 1 numbers, a channel each; mean has 3",
        ),
        (
            {"preprocessing": data.Preprocessing(mean=(0.5,))},
            "mean and std must have 1 numbers, a channel each; std has 0",
        ),
        (
            {"preprocessing": data.Preprocessing(std=(0.5,))},
            "mean and std must have 1 numbers, a channel each; mean has 0",
        ),
        (
            {"preprocessing": data.Preprocessing(mean=(0.5,), std=(0.0,))},
            r"mean and std must be finite, and std above 0; are \(0.5,\) and \(0.0,\)",
        ),
    ],
)
def test_a_data_set_is_checked_when_it_is_made(change, message):
    data.Dataset("good", 4, **good_arrays())
    with pytest.raises(ConfigError, match=f"^data set bad: .*{message}") as error:
        data.Dataset("bad", 4, **{**good_arrays(), **change})
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("num_classes", [4.0, 0, "four"])
def test_the_number_of_classes_is_a_number(num_classes):
    with pytest.raises(ConfigError, match="num_classes must be a whole number of at least 1"):
        data.Dataset("bad", num_classes, **good_arrays())


def test_positions_outside_the_data_are_refused():
    arrays = good_arrays()
    arrays["splits"] = {**arrays["splits"], "test": np.asarray([4])}
    with pytest.raises(ValueError, match="positions of test"):
        data.Dataset("bad", 4, **arrays)


def test_split_shares():
    parts = split_training(50_000, 7)
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 37_500, "validation": 7_500, "distillation": 5_000,
    }  # fmt: skip
    assert len(np.unique(np.concatenate(list(parts.values())))) == 50_000


def write_idx(path, array, compress=True):
    raw = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    raw += array.astype(np.uint8).tobytes()
    if compress:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(raw))
    else:
        path.write_bytes(raw)


@pytest.fixture
def idx_folder(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 10)):
        images = rng.integers(0, 256, (count, 28, 28))
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", images, compress=part == "train")
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", np.arange(count) % 10)
    return tmp_path


def test_idx_files_plain_and_gzipped(idx_folder):
    dataset = fashion_mnist.load(str(idx_folder), 0)
    assert dataset.samples.shape == (50, 28, 28, 1)
    assert dataset.labels[40:].tolist() == list(range(10))
    assert dataset.splits["test"].tolist() == list(range(40, 50))


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def cut_plainly(path):
    """A sound archive whose content is too short."""
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-20]))


def scramble(path):
    path.write_bytes(gzip.compress(b"not an IDX file, but long enough for a header"))


def label_out_of_range(path):
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[-1] = 99
    path.write_bytes(gzip.compress(bytes(raw)))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-images-idx3-ubyte.gz", lambda p: p.unlink(), "no file train-images-idx3-ubyte"),
        ("train-images-idx3-ubyte.gz", cut, "train-images-idx3-ubyte.gz cannot be read"),
        ("train-images-idx3-ubyte.gz", cut_plainly, "holds 31356 bytes, its header says 31376"),
        ("t10k-images-idx3-ubyte", cut, "t10k-images-idx3-ubyte holds"),
        ("train-labels-idx1-ubyte.gz", scramble, "is not an IDX file"),
        ("t10k-labels-idx1-ubyte.gz", label_out_of_range, "labels 0..9"),
    ],
)
def test_bad_idx_files(idx_folder, name, damage, message):
    damage(idx_folder / name)
    with pytest.raises(ConfigError, match=message):
        fashion_mnist.load(str(idx_folder), 0)


def test_fashion_mnist_needs_a_folder():
    with pytest.raises(ConfigError, match="data_dir="):
        fashion_mnist.load("", 0)


def test_crop_pads_with_zeros_for_clients_and_reflects_for_synthesis():
    how = Preprocessing(crop_padding=2)
    images = jnp.arange(1.0, 17.0).reshape(1, 4, 4, 1).repeat(200, axis=0)
    key = jax.random.key(0)
    padded = {
        "constant": np.pad(np.arange(1.0, 17.0).reshape(4, 4), 2),
        "reflect": np.pad(np.arange(1.0, 17.0).reshape(4, 4), 2, mode="reflect"),
    }
    for function, mode in (
        (augment.client_inputs, "constant"), (augment.synthetic_inputs, "reflect"),
    ):  # fmt: skip
        crops = {padded[mode][i : i + 4, j : j + 4].tobytes() for i in range(5) for j in range(5)}
        seen = {np.asarray(x[..., 0], np.float64).tobytes() for x in function(images, key, how)}
        # 200 draws of 25 corners miss a given corner with probability 3e-4.
        assert seen == crops


@pytest.mark.parametrize("size", [(3, 5), (6, 7)])
def test_both_ways_to_crop_agree(size):
    """One by one, as a CPU does, and by a choice among all places, as a TPU does; every place
    comes up. The gradient too, which goes where the pixels came from."""
    height, width = 6, 7
    rows, columns = height - size[0] + 1, width - size[1] + 1
    corners = jnp.asarray([(r, c) for r in range(rows) for c in range(columns)])
    images = jax.random.normal(jax.random.key(0), (len(corners), height, width, 2))
    fetched = augment.crop(images, corners, size)
    for image, (row, column), part in zip(images, corners.tolist(), fetched, strict=True):
        expected = image[row : row + size[0], column : column + size[1]]
        np.testing.assert_array_equal(part, expected)
    np.testing.assert_array_equal(augment.choose_parts(images, corners, size), fetched)

    def slope(way):
        return jax.grad(lambda x: (way(x, corners, size) ** 3).sum())(images)

    np.testing.assert_array_equal(slope(augment.choose_parts), slope(augment.crop))


def test_flip_is_drawn_per_sample():
    images = jnp.arange(3.0).reshape(1, 1, 3, 1).repeat(400, axis=0)
    flipped = augment.client_inputs(images, jax.random.key(1), Preprocessing(flip=True))
    share = float((flipped[:, 0, 0, 0] == 2).mean())
    assert share == pytest.approx(0.5, abs=0.1)  # four standard deviations
    assert set(np.asarray(flipped[:, 0, 0, 0]).tolist()) == {0.0, 2.0}


def test_normalisation_and_bytes():
    how = Preprocessing(mean=(0.5, 0.2, 0.1), std=(0.5, 0.1, 0.2))
    images = jnp.full((1, 1, 1, 3), 51, jnp.uint8)
    np.testing.assert_allclose(
        augment.plain_inputs(images, how)[0, 0, 0], [-0.6, 0.0, 0.5], atol=1e-6
    )


def test_augmentation_is_differentiable():
    how = Preprocessing(crop_padding=1, flip=True)
    gradient = jax.grad(lambda x: augment.synthetic_inputs(x, jax.random.key(0), how).sum())(
        jnp.ones((8, 4, 4, 1))
    )
    # Every output pixel comes from exactly one input pixel.
    assert float(gradient.sum()) == 8 * 16


def test_a_rare_class_is_in_every_split_of_the_training_data():
    """Ten of two thousand: without labels some seed leaves one of the splits without any."""
    labels = np.repeat(np.arange(2), [1990, 10])
    for seed in range(20):
        splits = split_training(2000, seed, labels)
        assert [int(labels[own].sum()) for own in splits.values()] == [8, 1, 1]
        assert [len(own) for own in splits.values()] == [1500, 300, 200]
    drawn = [split_training(2000, seed) for seed in range(20)]
    assert min(labels[own].sum() for splits in drawn for own in splits.values()) == 0
