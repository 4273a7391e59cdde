"""Federated methods: one file each, all composed over the interface of `methods.method`."""

import importlib
from typing import Any, NamedTuple

import jax

from fedrevive_jax.config import Config
from fedrevive_jax.methods.method import Ingredients, Method, UpdateRule, compose
from fedrevive_jax.models.model import Params

__all__ = ["Ingredients", "Method", "Shapes", "UpdateRule", "compose", "create", "shapes"]


def create(config: Config, ingredients: Ingredients) -> Method:
    """The method that a configuration names; its module is called like it."""
    module = importlib.import_module(f"fedrevive_jax.methods.{config.method}")
    return module.create(config, ingredients)


class Shapes(NamedTuple):
    """Shapes of the method's state, of what it keeps of one client, and of what it sends with a
    version."""

    state: Any
    entry: Any
    extra: Any


def shapes(config: Config, ingredients: Ingredients, params: Params) -> Shapes:
    """Shapes of a method's arrays; nothing is allocated.

    Args:
      config: names the method.
      ingredients: their `frozen` may be shapes, too.
      params: arrays or their shapes.
    """

    def arrays(params, frozen):
        method = create(config, ingredients._replace(frozen=frozen))
        state = method.init(params)
        return Shapes(state, method.entry(params), method.extra(state))

    return jax.eval_shape(arrays, params, ingredients.frozen)
