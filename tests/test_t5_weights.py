"""Weights in the Hugging Face layout: every way in which a folder can be wrong is named.

That the numbers mean what `transformers` means by them is held by test_parity_t5.
"""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedrevive_jax.data import tokens
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.models import t5_weights
from fedrevive_jax.running import restore

SIZES = {
    "vocab_size": 3300, "d_model": 8, "d_kv": 3, "d_ff": 16, "num_layers": 2, "num_heads": 2,
    "relative_attention_num_buckets": 8, "feed_forward_proj": "relu",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A whole folder with numbers of its own in every tensor."""
    shapes = {
        "shared": (3300, 8),
        "encoder.final_layer_norm": (8,),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias": (8, 2),
    }
    for i in range(2):
        layer = f"encoder.block.{i}.layer"
        shapes |= {f"{layer}.0.SelfAttention.{name}": (6, 8) for name in "qkv"}
        shapes |= {
            f"{layer}.0.SelfAttention.o": (8, 6),
            f"{layer}.0.layer_norm": (8,),
            f"{layer}.1.DenseReluDense.wi": (16, 8),
            f"{layer}.1.DenseReluDense.wo": (8, 16),
            f"{layer}.1.layer_norm": (8,),
        }
    rng = np.random.default_rng(0)
    tensors = {f"{k}.weight": rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    return tmp_path


def read(folder):
    return t5_weights.read(str(folder), t5_weights.read_shape(str(folder)))


def test_a_whole_folder_is_read(folder):
    params, table = read(folder)
    tensors = load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(table, tensors["shared.weight"])
    np.testing.assert_array_equal(
        params["layer1"]["feed_forward_in"]["kernel"],
        tensors["encoder.block.1.layer.1.DenseReluDense.wi.weight"].T,
    )
    # Written before these could vary.
    assert t5_weights.read_shape(str(folder)).max_distance == 128


def rewrite(folder, **changes):
    sizes = {**SIZES, **changes}
    kept = {name: value for name, value in sizes.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def drop_tensor(folder):
    change_tensors(folder, lambda tensors: tensors.pop("encoder.final_layer_norm.weight"))


def reshape_tensor(folder):
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name][:, :5].copy()}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "holds no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json holds no sizes"),
        (lambda f: rewrite(f, d_ff=None), "config.json has no d_ff"),
        (lambda f: rewrite(f, d_model="512"), "d_model='512'; must be a number, at least 1"),
        (lambda f: rewrite(f, num_layers=1), "num_layers=1; must be a number, at least 2"),
        (lambda f: rewrite(f, num_heads=True), "num_heads=True; must be a number, at least 1"),
        (lambda f: rewrite(f, layer_norm_epsilon=float("nan")), "epsilon=nan; must be a number"),
        (lambda f: rewrite(f, feed_forward_proj="gated-gelu"), "must be relu"),
        (
            lambda f: rewrite(f, relative_attention_max_distance=2),
            "max_distance=2; must be above a quarter of 8 buckets",
        ),
        (lambda f: rewrite(f, vocab_size=3000), "must be above 3200"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"cut"), "safetensors cannot be read"),
        (drop_tensor, "has no tensor encoder.final_layer_norm.weight"),
        (reshape_tensor, r"SelfAttention.q.weight is \[6, 5\]; config.json says \[6, 8\]"),
    ],
)
def test_a_bad_folder_is_named(folder, damage, message):
    read(folder)
    damage(folder)
    with pytest.raises(ConfigError, match=message):
        read(folder)


def test_no_folder(tmp_path):
    with pytest.raises(ConfigError, match="none: no such folder"):
        t5_weights.read_shape(str(tmp_path / "none"))


def test_other_weights_or_another_tokenizer_than_the_runs_are_noticed(folder):
    (folder / "tokenizer.json").write_text("one")
    origin = {
        "weights_sha256": t5_weights.digest(str(folder)),
        "tokenizer_sha256": tokens.digest(str(folder)),
    }
    restore._check_weights(str(folder), origin)
    (folder / "tokenizer.json").write_text("another")
    with pytest.raises(ConfigError, match="its tokenizer is not what the run started from"):
        restore._check_weights(str(folder), origin)
    change_tensors(folder, lambda tensors: tensors.update({"shared.weight": np.ones((3300, 8))}))
    with pytest.raises(
        ConfigError, match=r"its model\.safetensors is not what the run started from"
    ):
        restore._check_weights(str(folder), origin)
