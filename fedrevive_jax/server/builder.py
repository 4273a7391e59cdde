"""A server from a configuration and what a server holds: no clients' data, no clock, no plan.

What it holds is a model and where it starts, its own samples and texts, and devices. The simulation
and a live federation build their server here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fedrevive_jax import methods
from fedrevive_jax.compute import devices
from fedrevive_jax.compute.streams import Stream, jax_key
from fedrevive_jax.config import Config
from fedrevive_jax.data import Dataset, seed_text, tokens
from fedrevive_jax.dfkd.prompts import SeedText
from fedrevive_jax.methods import Ingredients
from fedrevive_jax.models import Model, t5_weights
from fedrevive_jax.models.model import Params, initial_taps
from fedrevive_jax.record.reading import read_params
from fedrevive_jax.server import client_cache
from fedrevive_jax.server.core import Server
from fedrevive_jax.server.shelf import ON_DEVICE, Shelf


class Start(NamedTuple):
    """What version 0 is made of.

    Attributes:
      params: its parameters.
      frozen: arrays of the model that nobody trains.
      origin: where they come from, and the tokenizer of a text data set; for the record.
    """

    params: Params
    frozen: Any
    origin: dict[str, str]


def start(
    config: Config,
    model: Model,
    dataset: Dataset,
    mesh: Mesh | None = None,
    origin: dict[str, str] | None = None,
) -> Start:
    """Random parameters, or those of an earlier run or of pretrained weights.

    Args:
      config: `seed`, `pretrained` and `t5_weights` are read.
      model: what starts.
      dataset: tells the tokenizer's origin.
      mesh: the devices that hold the frozen arrays.
      origin: that of the run that is continued; its parameters come from its checkpoint then.

    Raises:
      ConfigError: `pretrained` holds no model like this one.
    """
    key = jax_key(config.seed, Stream.MODEL_INIT)
    params, frozen = model.init(key), devices.replicate(mesh, model.frozen(key))
    if origin is None:
        origin = _origin(config, dataset)
        if config.pretrained:
            version, params = read_params(Path(config.pretrained), model, flag="pretrained")
            origin["start"] = f"version {version} of {config.pretrained}"
    return Start(params, frozen, origin)


def holdings(
    config: Config,
    model: Model,
    dataset: Dataset,
    augment: Callable[[Any, jax.Array], Any],
    augment_real: Callable[[Any, jax.Array], Any],
    frozen: Any,
    *,
    class_mixes: Any = None,
    mesh: Mesh | None = None,
) -> Ingredients:
    """What the server holds, for its method.

    Args:
      config: `seed_text` is read.
      model, frozen: the model and its frozen arrays.
      dataset: the server's own; its distillation split is what `dd_fedrevive` distils on.
      augment, augment_real: (samples, key) -> augmented samples, for samples that the server makes
        and for those of its data set.
      class_mixes: true label histograms of the clients, float32 [N, classes]. A simulation has
        them; a live federation has none.
      mesh: devices that share the server's work.
    """
    kept = dataset.splits["distillation"]
    return Ingredients(
        model=model,
        augment=augment,
        frozen=frozen,
        class_mixes=class_mixes,
        augment_real=augment_real,
        real_samples=(dataset.samples[kept], dataset.labels[kept]),
        seed_text=_read_seed_text(config, dataset),
        mesh=mesh,
    )


def create(
    config: Config,
    params: Params,
    ingredients: Ingredients,
    *,
    shelf: Shelf = ON_DEVICE,
    beside: int = 0,
) -> Server:
    """The configured server at version 0.

    Args:
      config: names the method, N, the seed and what is taken in.
      params: the initial global parameters.
      ingredients: see `holdings`.
      shelf: where stale versions wait.
      beside: bytes that live on the device beside the method's memory of the clients.

    Raises:
      ConfigError: the method lacks something, or its memory of the clients does not fit.
    """
    method = methods.create(config, ingredients)
    entry = jax.eval_shape(method.entry, params)
    return Server(
        method,
        params,
        initial_taps(ingredients.model),
        config.seed,
        ingredients.mesh,
        shelf,
        client_cache.create(config, entry, ingredients.mesh, beside),
        num_clients=config.num_clients,
        max_update_norm=config.max_update_norm,
    )


def _origin(config: Config, dataset: Dataset) -> dict[str, str]:
    """Where the first parameters come from, and the tokenizer of a text data set."""
    if config.t5_weights:
        return {
            "start": config.t5_weights,
            "weights_sha256": t5_weights.digest(config.t5_weights),
            "tokenizer_sha256": tokens.digest(config.t5_weights),
            "tokenizer": config.t5_weights,
        }
    tokenizer = dataset.tokenizer
    if tokenizer is None:
        return {"start": "random"}
    where = "trained on the training split" if tokenizer.serialised else "given with the data set"
    return {"start": "random", "tokenizer": f"{where}, {tokenizer.size} entries"}


def _read_seed_text(config: Config, dataset: Dataset) -> SeedText | None:
    if not config.seed_text:
        return None
    ids, labels = seed_text.read(config.seed_text, dataset)
    return SeedText(jnp.asarray(ids), jnp.asarray(labels))
