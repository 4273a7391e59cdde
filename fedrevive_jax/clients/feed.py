"""How stored samples become model inputs on the device: where `data` and `models` meet."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fedrevive_jax.compute import rows
from fedrevive_jax.data import Dataset, augment
from fedrevive_jax.models.model import Text


class Feed(NamedTuple):
    """The way from a data set to a model's inputs.

    Attributes:
      store: pytree that holds the samples, arrays of NumPy still, see `rows.packed`; its copy on
        the device is given to the functions below as an argument, so that no program carries it
        as a constant.
      training: (store, positions int [b], key) -> inputs of local training, augmented.
      evaluation: (store, positions int [b]) -> inputs as they are.
      augment: (samples, key) -> augmented samples, for samples that the server makes.
      augment_real: the same for real samples that it keeps: a client's augmentation.
    """

    store: Any
    training: Callable[[Any, jax.Array, jax.Array], Any]
    evaluation: Callable[[Any, jax.Array], Any]
    augment: Callable[[Any, jax.Array], Any]
    augment_real: Callable[[Any, jax.Array], Any]


def make_feed(dataset: Dataset, frozen: Any) -> Feed:
    """The feed of a data set for a model whose frozen arrays are `frozen`."""
    samples = dataset.samples
    if dataset.is_text:
        # Text is not augmented.
        return Feed(
            Text(samples, frozen),
            lambda store, positions, key: _look_up(store, positions),
            _look_up,
            lambda samples, key: samples,
            lambda samples, key: samples,
        )
    how = dataset.preprocessing
    image = jax.ShapeDtypeStruct(dataset.input_shape, samples.dtype)

    def images(store, positions):
        return rows.unpacked(store[positions], image)

    return Feed(
        rows.packed(samples),
        lambda store, positions, key: augment.client_inputs(images(store, positions), key, how),
        lambda store, positions: augment.plain_inputs(images(store, positions), how),
        lambda samples, key: augment.synthetic_inputs(samples, key, how),
        lambda samples, key: augment.client_inputs(samples, key, how),
    )


def _look_up(store: Text, positions: jax.Array) -> Text:
    return Text(store.content[positions], store.table)
