"""Reads a pretrained T5 encoder from a local folder in the Hugging Face layout."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from fedrevive_jax.data.errors import reading
from fedrevive_jax.errors import ConfigError, one_line
from fedrevive_jax.models.model import Params
from fedrevive_jax.models.t5 import T5Shape

WEIGHTS, SIZES = "model.safetensors", "config.json"
# Synthesis judges by two layers; position buckets come in halves of halves.
LEAST = {
    "num_layers": 2,
    "relative_attention_num_buckets": 4,
    "layer_norm_epsilon": 0,
}


def read_shape(folder: str) -> T5Shape:
    """The sizes that the folder's config.json tells.

    Raises:
      ConfigError: the file is missing, lacks an entry, or tells of another kind of encoder.
    """
    path = Path(folder).expanduser() / SIZES
    with reading(path):
        if not path.parent.is_dir():
            raise ConfigError("t5_weights", folder, "no such folder")
    try:
        sizes = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("t5_weights", folder, f"holds no {SIZES}") from None
    except (OSError, ValueError, RecursionError) as error:
        message = one_line(error)
        raise ConfigError("t5_weights", folder, f"{SIZES} cannot be read ({message})") from None
    if not isinstance(sizes, dict):
        raise ConfigError("t5_weights", folder, f"{SIZES} holds no sizes")
    kind = sizes.get("feed_forward_proj", "relu")
    if kind != "relu":
        raise ConfigError(
            "t5_weights", folder, f"{SIZES} says feed_forward_proj={kind}; must be relu"
        )
    names = {
        "vocabulary": "vocab_size",
        "width": "d_model",
        "feed_forward": "d_ff",
        "layers": "num_layers",
        "heads": "num_heads",
        "head_width": "d_kv",
        "buckets": "relative_attention_num_buckets",
        "max_distance": "relative_attention_max_distance",
        "epsilon": "layer_norm_epsilon",
    }
    # Configurations written before these two could vary do not name them.
    sizes = {"relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6, **sizes}
    missing = sorted(set(names.values()) - set(sizes))
    if missing:
        raise ConfigError("t5_weights", folder, f"{SIZES} has no {missing[0]}")
    for name in names.values():
        kinds = (int, float) if name == "layer_norm_epsilon" else int
        given, least = sizes[name], LEAST.get(name, 1)
        known = isinstance(given, kinds) and not isinstance(given, bool)
        if not known or not least <= given < math.inf:
            raise ConfigError(
                "t5_weights",
                folder,
                f"{SIZES} says {name}={given!r}; must be a number, at least {least}",
            )
    shape = T5Shape(**{ours: sizes[theirs] for ours, theirs in names.items()})
    if shape.max_distance <= shape.buckets // 4:
        raise ConfigError(
            "t5_weights",
            folder,
            f"{SIZES} says relative_attention_max_distance="
            f"{shape.max_distance}; must be above a quarter of {shape.buckets} buckets",
        )
    if shape.vocabulary <= shape.classifier_token:
        raise ConfigError(
            "t5_weights",
            folder,
            f"{SIZES} says vocab_size={shape.vocabulary}; must be above "
            f"{shape.classifier_token}, the token in front of every text",
        )
    return shape


def read(folder: str, shape: T5Shape) -> tuple[Params, Any]:
    """The encoder's parameters, named as in `t5.T5Classifier`, and the token table [V, width].

    Raises:
      ConfigError: the file cannot be read, a tensor is missing or has another shape; it is named.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ConfigError(
            "t5_weights", folder, "needs the package safetensors; pip install -e '.[text]'"
        ) from None
    path = Path(folder).expanduser() / WEIGHTS
    with reading(path):
        if not path.is_file():
            raise ConfigError("t5_weights", folder, f"holds no {WEIGHTS}")
    try:
        with safe_open(path, framework="flax") as file:
            return _read_encoder(file, folder, shape)
    except (SafetensorError, OSError) as error:
        message = one_line(error)
        raise ConfigError("t5_weights", folder, f"{WEIGHTS} cannot be read ({message})") from None


def digest(folder: str) -> str:
    """SHA-256 of the weights, in hexadecimal.

    Raises:
      ConfigError: there are none, or they cannot be read.
    """
    path = Path(folder).expanduser() / WEIGHTS
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise ConfigError("t5_weights", folder, f"holds no {WEIGHTS}") from None
    except OSError as error:
        message = one_line(error)
        raise ConfigError("t5_weights", folder, f"{WEIGHTS} cannot be read ({message})") from None


def _read_encoder(file: Any, folder: str, shape: T5Shape) -> tuple[Params, Any]:
    present = set(file.keys())

    def tensor(name: str, *expected: int):
        if name not in present:
            raise ConfigError("t5_weights", folder, f"{WEIGHTS} has no tensor {name}")
        found = tuple(file.get_slice(name).get_shape())
        if found != expected:
            raise ConfigError(
                "t5_weights", folder, f"{name} is {list(found)}; {SIZES} says {list(expected)}"
            )
        return jnp.asarray(file.get_tensor(name), jnp.float32)

    def kernel(name: str, inputs: int, outputs: int):
        return {"kernel": tensor(f"{name}.weight", outputs, inputs).T}

    def scale(name: str):
        return {"scale": tensor(f"{name}.weight", shape.width)}

    width, inner = shape.width, shape.heads * shape.head_width
    params = {}
    for i in range(shape.layers):
        attention, forward = (f"encoder.block.{i}.layer.{part}" for part in (0, 1))
        params[f"layer{i}"] = {
            "attention_norm": scale(f"{attention}.layer_norm"),
            "query": kernel(f"{attention}.SelfAttention.q", width, inner),
            "key": kernel(f"{attention}.SelfAttention.k", width, inner),
            "value": kernel(f"{attention}.SelfAttention.v", width, inner),
            "output": kernel(f"{attention}.SelfAttention.o", inner, width),
            "feed_forward_norm": scale(f"{forward}.layer_norm"),
            "feed_forward_in": kernel(f"{forward}.DenseReluDense.wi", width, shape.feed_forward),
            "feed_forward_out": kernel(f"{forward}.DenseReluDense.wo", shape.feed_forward, width),
        }
    biases = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    params["relative_bias"] = tensor(biases, shape.buckets, shape.heads)
    params["final_norm"] = scale("encoder.final_layer_norm")
    # The table is shared with the decoder; files keep it under one or both of its names.
    names = ("shared.weight", "encoder.embed_tokens.weight")
    name = next((name for name in names if name in present), names[0])
    return params, tensor(name, shape.vocabulary, width)
