"""The record that the rest of the package knows of a model."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedrevive_jax.compute.streams import root_key
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.models.layers import add, batch_statistics

Params = Any  # a pytree of float arrays
# Statistics at each tap: ((mean, variance), ...), each of shape [channels of that tap].
Taps = tuple[tuple[jax.Array, jax.Array], ...]


# Numbers of a call's inputs up to which a larger call is no slower on a CPU.
CACHED_NUMBERS = 16_384


class Embedded(NamedTuple):
    """Text that has no tokens: embeddings float [b, length, d], mask bool [b, length]."""

    embeddings: jax.Array
    mask: jax.Array


class Text(NamedTuple):
    """A text model's input: token ids int [b, length] (0 is padding) or `Embedded`, beside the
    frozen token table [V, d] that ids index.
    """

    content: Any
    table: jax.Array


class Vocabulary(NamedTuple):
    """What a text model reads: ids below `size`, embeddings of `width` numbers."""

    size: int
    width: int


class Head(NamedTuple):
    """The last layer of a model, from features to logits.

    Attributes:
      params: the model's parameters -> those of the layer.
      width: the layer's parameters, or their shapes -> d, how many features it reads.
      apply: (the layer's parameters, features [b, d]) -> logits [b, classes].
    """

    params: Callable[[Params], Params]
    width: Callable[[Params], int]
    apply: Callable[[Params, jax.Array], jax.Array]


class Model(NamedTuple):
    """A model as pure functions.

    Attributes:
      name: for records.
      input_shape: shape of one input, without the batch axis: (height, width, channels) of an image
        or (length,) of a text.
      num_classes: size of the logits.
      init: key -> parameters.
      apply: (parameters, inputs, key or None) -> (logits [b, classes], activations), where inputs
        are images [b, *input_shape] or a `Text`, and the activations [b, ..., channels] are those
        at the taps: after every convolution before the ReLU, or at position 0 after every layer of
        an encoder. A key turns dropout on, where the model has any.
      frozen: the key of `init` -> arrays that nobody trains: the token table of a text model. They
        are shared, never sent and not part of a version.
      vocabulary: for a text model; None for a model of images.
      platform: what its programs are compiled for, `cpu`, `gpu` or `tpu`; what is fastest differs.
      head: its last layer, for methods that make features; None where it is not known.
    """

    name: str
    input_shape: tuple[int, ...]
    num_classes: int
    init: Callable[[jax.Array], Params]
    apply: Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]]
    frozen: Callable[[jax.Array], Any] = lambda key: ()
    vocabulary: Vocabulary | None = None
    platform: str = "cpu"
    head: Head | None = None


def dense_head(name: str) -> Head:
    """The head that is a dense layer of this name: its kernel [d, classes], and a bias or none."""

    def apply(layer, features):
        logits = features @ layer["kernel"]
        return add(logits, layer["bias"]) if "bias" in layer else logits

    return Head(lambda params: params[name], lambda layer: layer["kernel"].shape[0], apply)


def with_precision(model: Model, precision: str) -> Model:
    """The model with its arithmetic in another precision.

    Parameters, statistics, logits, losses and everything made of them stay float32; with `bfloat16`
    inputs, weights and activations are rounded within each call.

    Args:
      model: computes in float32.
      precision: `float32`, `bfloat16`, or `auto`, see `default_precision`.
    """
    if precision == "auto":
        precision = default_precision(model.platform)
    head = model.head
    if precision == "float32":
        exact = head and head._replace(apply=exactly(head.apply, model.platform))
        return model._replace(apply=exactly(model.apply, model.platform), head=exact)

    def apply(params, inputs, key=None):
        # The token table of a text stays as it is: only what is looked up in it is rounded.
        content = inputs.content if isinstance(inputs, Text) else inputs
        content = halved(content)
        inputs = Text(content, inputs.table) if isinstance(inputs, Text) else content
        logits, activations = model.apply(halved(params), inputs, key)
        return logits.astype(jnp.float32), activations

    def rounded(head: Head) -> Head:
        def apply(layer, features):
            return head.apply(halved(layer), halved(features)).astype(jnp.float32)

        return head._replace(apply=apply)

    return model._replace(apply=apply, head=head and rounded(head))


def halved(tree: Any) -> Any:
    """A pytree with its arrays of float32 rounded to bfloat16."""

    def rounded(leaf):
        return leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf

    return jax.tree.map(rounded, tree)


def exactly(function: Callable, platform: str) -> Callable:
    """The function with products of float32 in float32, on its way back, too.

    An accelerator would round their factors, to TF32 or bfloat16. A CPU does not.
    """
    if platform == "cpu":
        return function

    @functools.wraps(function)
    def precise(*args, **kwargs):
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return precise


def default_precision(platform: str) -> str:
    """What `auto` stands for: bfloat16 on accelerators, which have units for it."""
    return "float32" if platform == "cpu" else "bfloat16"


def from_flax(
    name: str,
    module: nn.Module,
    input_shape: tuple[int, ...],
    num_classes: int,
    platform: str | None = None,
    head: str | None = None,
) -> Model:
    """Wraps a Flax module for images that returns (logits, activations), see `Model`.

    Local training gives it a key for dropout; everything else is deterministic. A module that has
    dropout is told by an argument `train`, `training` or `deterministic`.

    Args:
      name: for records.
      module: a module of `flax.linen` with parameters alone. Running statistics, as BatchNorm
        keeps them, are no parameters; GroupNorm and LayerNorm have none.
      input_shape: (height, width, channels) of one image.
      num_classes: size of the logits.
      platform: see `Model`; None is that of the default backend.
      head: name of the dense layer that makes the logits, see `dense_head`; None where there is
        none, or no method asks for it.

    Raises:
      ConfigError: it is no such module. What it computes is judged when it is used.
    """
    if not isinstance(module, nn.Module):
        raise ConfigError("model", name, "must be made of a module of flax.linen")
    arguments = inspect.signature(type(module).__call__).parameters

    def mode(training: bool) -> dict[str, Any]:
        told = {"train": training, "training": training, "deterministic": not training}
        return {argument: value for argument, value in told.items() if argument in arguments}

    def init(key):
        made = module.init(key, jnp.zeros((1, *input_shape)), **mode(False))
        others = sorted(set(made) - {"params"})
        if others:
            raise ConfigError(
                "model",
                name,
                f"must have parameters alone; has {', '.join(others)}, too"
                + (" (instead of BatchNorm, use GroupNorm)" if "batch_stats" in others else ""),
            )
        return made.get("params", {})

    def apply(params, inputs, key=None) -> Any:
        rngs = None if key is None else {"dropout": key}
        return module.apply({"params": params}, inputs, rngs=rngs, **mode(key is not None))

    return Model(
        name,
        tuple(input_shape),
        num_classes,
        jax.jit(init),
        apply,
        platform=platform or jax.default_backend(),
        head=None if head is None else dense_head(head),
    )


def as_inputs(samples: Any, frozen: Any) -> Any:
    """Samples as inputs of a model: texts, ids or embedded, get the frozen token table beside them;
    images are inputs already.
    """
    is_text = isinstance(samples, Embedded) or jnp.issubdtype(samples.dtype, jnp.signedinteger)
    return Text(samples, frozen) if is_text else samples


def per_call(count: int, batch: int, input_shape: tuple[int, ...], platform: str) -> int:
    """How many of `count` equal batches go through a network in one call; a divisor of `count`.

    An accelerator takes all. On a CPU smaller calls stay in its caches: with 32 images in a call,
    not 256, a distillation step of the ConvNet took 0.43 s instead of 0.66 s on two cores; the
    small images of digits gain nothing.
    """
    if platform != "cpu":
        return count
    fits = max(CACHED_NUMBERS // (batch * math.prod(input_shape)), 1)
    return max(size for size in range(1, min(fits, count) + 1) if count % size == 0)


def tap_statistics(activations: tuple[jax.Array, ...]) -> Taps:
    """Mean and biased variance per channel at every tap, over all other axes."""
    return tuple(batch_statistics(activation) for activation in activations)


def gaussian_inputs(model: Model, key: jax.Array, count: int, frozen: Any) -> Any:
    """Standard normal images [count, ...], or unmasked standard normal embeddings."""
    if model.vocabulary is None:
        return jax.random.normal(key, (count, *model.input_shape))
    shape = (count, *model.input_shape)
    embeddings = jax.random.normal(key, (*shape, model.vocabulary.width))
    return Text(Embedded(embeddings, jnp.ones(shape, bool)), frozen)


def parameter_count(tree: Any) -> int:
    """Number of scalars in a pytree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def initial_taps(model: Model) -> Taps:
    """Statistics of a version that has seen no data: mean 0, variance 1."""

    def statistics(key):
        inputs = gaussian_inputs(model, key, 1, model.frozen(key))
        return tap_statistics(model.apply(model.init(key), inputs)[1])

    shapes = jax.eval_shape(statistics, root_key())
    return tuple((jnp.zeros(m.shape, m.dtype), jnp.ones(v.shape, v.dtype)) for m, v in shapes)
