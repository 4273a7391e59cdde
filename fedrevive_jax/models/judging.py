"""A model is judged once, by its shapes, before anything is compiled.

A network that a user gives would otherwise fail deep inside a compiled step, or broadcast and
train something else than is meant.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from fedrevive_jax import models
from fedrevive_jax.compute.streams import root_key
from fedrevive_jax.config import Config
from fedrevive_jax.data import Dataset
from fedrevive_jax.errors import ConfigError, FileError, UserError, one_line
from fedrevive_jax.models.model import Head, Model, Params, Text, gaussian_inputs

# Samples of the call that is judged.
BATCH = 2


def fitting(
    config: Config,
    dataset: Dataset,
    model: Model | None = None,
    platform: str | None = None,
) -> Model:
    """The given or the configured model, in the configured precision, for a platform.

    Args:
      config: names a model, and the precision.
      dataset: what the model has to read.
      model: stands in for the one that the configuration names, and is judged.
      platform: see `Model`; None is that of the default backend.

    Raises:
      ConfigError: it is not what a model has to be, or does not read what the data set holds.
    """
    check_kind(dataset)
    platform = platform or jax.default_backend()
    if model is None:
        model = models.create(config, dataset.input_shape, dataset.num_classes, platform)
    else:
        check_given(config, model)
    _check_reading(config, dataset, model)
    return models.with_precision(model._replace(platform=platform), config.precision)


def check_given(config: Config, model: Any) -> None:
    """Whether what stands in for a named model is a `Model`, and has what the method asks of it.

    Raises:
      ConfigError: it is not, or has not.
    """
    if not isinstance(model, Model):
        raise ConfigError("model", None, f"must be a `Model`, see `from_flax`; is {_told(model)}")
    if not judge(model) and config.synthesises and config.feature_weight:
        raise ConfigError(
            "model",
            model.name,
            "has no taps, whose statistics synthesis matches; must have some, or feature_weight=0",
        )


def check_shapes(model: Model, input_shape: tuple[int, ...], num_classes: int) -> None:
    """Whether a model takes the samples of a data set, and tells as many classes.

    Raises:
      ConfigError: it does not.
    """
    if (tuple(model.input_shape), model.num_classes) != (input_shape, num_classes):
        raise ConfigError(
            "model",
            model.name,
            f"takes {tuple(model.input_shape)} and tells {model.num_classes} classes; the data set "
            f"has {input_shape} and {num_classes}",
        )


def check_kind(dataset: Any) -> None:
    """Whether what stands in for a named data set is a `Dataset`, which has checked itself.

    Raises:
      ConfigError: it is not.
    """
    if not isinstance(dataset, Dataset):
        raise ConfigError("dataset", None, f"must be a `Dataset`; is {_told(dataset)}")


def judge(model: Model) -> int:
    """The number of a model's taps, if it keeps to the contract of `Model`; nothing is computed.

    Raises:
      ConfigError: it does not. The error tells what it gives and what is wanted.
    """

    def refuse(reason: str) -> NoReturn:
        raise ConfigError("model", model.name, reason)

    key = root_key()
    params = _shapes(model, "init", model.init, key)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        refuse("has no parameters")
    for path, leaf in leaves:
        if leaf.dtype != jnp.float32 or leaf.weak_type:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            given = "a plain number" if leaf.weak_type else _told(leaf)
            refuse(
                f"parameters must be arrays of float32, `precision` says how models compute; "
                f"{name or 'they'} is {given}"
            )
    frozen = _shapes(model, "frozen", model.frozen, key)
    inputs = jax.eval_shape(lambda key, own: gaussian_inputs(model, key, BATCH, own), key, frozen)
    calls = [(inputs, None), (inputs, key)]
    if model.vocabulary is not None:
        ids = jax.ShapeDtypeStruct((BATCH, *model.input_shape), jnp.int32)
        calls.append((Text(ids, frozen), None))
    activations = ()
    for given, dropout in calls:
        result = _shapes(model, "apply", model.apply, params, given, dropout)
        if not (isinstance(result, (tuple, list)) and len(result) == 2):
            refuse(f"`apply` must give (logits, activations); gives {_told(result)}")
        logits, activations = result
        wanted = jax.ShapeDtypeStruct((BATCH, model.num_classes), jnp.float32)
        if not _is_array(logits, wanted.shape, wanted.dtype) or logits.ndim > 2:
            refuse(f"logits of {BATCH} samples must be {_told(wanted)}; are {_told(logits)}")
        if not isinstance(activations, (tuple, list)):
            refuse(f"activations must be a tuple, an array a tap; are {_told(activations)}")
        for tap, own in enumerate(activations):
            if not _is_array(own, (BATCH,), jnp.floating) or own.ndim < 2:
                refuse(
                    f"activations of {BATCH} samples must be float [{BATCH}, ..., channels]; "
                    f"those at tap {tap} are {_told(own)}"
                )
    if model.head is not None:
        _judge_head(model, model.head, params)
    return len(activations)


def _judge_head(model: Model, head: Head, params: Params) -> None:
    """Whether the last layer is what `Head` says.

    Raises:
      ConfigError: it is not.
    """

    def logits(params):
        layer = head.params(params)
        return head.apply(layer, jnp.zeros((BATCH, head.width(layer)), jnp.float32))

    try:
        made = jax.eval_shape(logits, params)
    except Exception as error:  # whatever a user's code raises
        told = f"{type(error).__name__}: {one_line(error)}"
        raise ConfigError("model", model.name, f"`head` is no layer of it ({told})") from error
    if not _is_array(made, (BATCH, model.num_classes), jnp.floating):
        raise ConfigError(
            "model",
            model.name,
            f"`head` must make {model.num_classes} logits; makes {_told(made)} of {BATCH} samples",
        )


def _check_reading(config: Config, dataset: Dataset, model: Model) -> None:
    """Whether a model reads what a data set holds.

    Raises:
      ConfigError: it does not.
    """
    check_shapes(model, dataset.input_shape, dataset.num_classes)
    if dataset.is_text != (model.vocabulary is not None):
        raise ConfigError(
            "model", model.name, f"does not read {'text' if dataset.is_text else 'images'}"
        )
    if model.vocabulary is not None:
        known = dataset.tokenizer.size if dataset.tokenizer else dataset.samples.max() + 1
        # A device would clamp ids beyond the table silently.
        if known > model.vocabulary.size:
            where = f"t5_weights={config.t5_weights}" if config.t5_weights else "the model"
            raise FileError(
                where,
                f"the token table has {model.vocabulary.size} rows; the tokenizer of "
                f"{dataset.name} has {known} entries",
            )


def _shapes(model: Model, name: str, function: Callable, *given: Any) -> Any:
    """What a function of the model gives, as shapes.

    Raises:
      ConfigError: it raises an error itself.
    """
    try:
        return jax.eval_shape(function, *given)
    except UserError:
        raise
    except Exception as error:  # whatever a user's code raises
        of = ""
        if name == "apply":
            _, inputs, dropout = given
            of = f" on {_told(inputs)} {'without' if dropout is None else 'with'} a key"
        told = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError("model", model.name, f"`{name}` fails{of}: {told}") from error


def _is_array(value: Any, start: tuple[int, ...], kind: Any) -> bool:
    """Whether it is the shape of an array whose first axes and dtype are these."""
    return (
        isinstance(value, jax.ShapeDtypeStruct)
        and value.shape[: len(start)] == start
        and jnp.issubdtype(value.dtype, kind)
    )


def _told(value: Any) -> str:
    """What a value is, in a message."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, Text):
        return "a text"
    if type(value) in (tuple, list) and len(value) < 4:
        return f"({', '.join(map(_told, value))})"
    return f"a {type(value).__module__}.{type(value).__qualname__}".replace("builtins.", "")
