"""Sources, splits and augmentation; every kind of bad file gets one clear line."""

import gzip
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
from fedrevive_jax.data.dataset import Preprocessing, split_training
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.presets import BY_DATASET, BY_METHOD


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


def good_arrays():
    return {
        "samples": np.zeros((4, 4, 4, 1), np.uint8),
        "labels": np.arange(4, dtype=np.int32),
        "splits": dict.fromkeys(("train", "validation", "distillation", "test"), np.arange(4)),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": np.zeros((4, 4, 4, 1))}, "samples must be uint8"),
        ({"samples": np.zeros((4, 4, 4), np.uint8)}, "samples must be uint8"),
        ({"samples": np.zeros((5, 4, 4, 1), np.uint8)}, "5 samples, 4 labels"),
        ({"labels": np.arange(4)}, "labels must be int32"),
        ({"labels": np.arange(1, 5, dtype=np.int32)}, "labels outside"),
        ({"splits": {"train": np.arange(4)}}, "no split 'distillation'"),
    ],
)
def test_a_data_set_is_checked_when_it_is_made(change, message):
    data.Dataset("good", 4, **good_arrays())
    with pytest.raises(ValueError, match=message):
        data.Dataset("bad", 4, **{**good_arrays(), **change})


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
